"""Choices: every knob once, values that a person reads, and the rows one step from another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layouts import cluster, mixture, workload
from tuner.core.choices import CHOICES, FOLLOWERS, codes_of, one_step, value_of
from tuner.core.layout import KNOBS, Layout
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import find_row, layout_at

TABLE = enumerate_layouts(
    workload(mixture()),
    cluster(8),
    {
        "tp": (1, 2),
        "pp": (1, 2, 4),
        "vpp": (1, 2),
        "ep": (1, 2),
        "etp": (1, 2),
        "sp": (False, True),
        "micro_batch_size": (1, 2),
        "recompute_granularity": ("none", "full"),
        "recompute_method": ("none", "uniform"),
        "recompute_num_layers": (0, 1),
    },
).table
LAYOUTS = [layout_at(TABLE, row) for row in range(len(TABLE))]
ROWS = st.integers(0, len(TABLE) - 1)


def _moved(one: Layout, other: Layout) -> set[str]:
    return {choice for choice in CHOICES if value_of(choice, one) != value_of(choice, other)}


def test_every_knob_belongs_to_one_choice() -> None:
    assert sorted(knob for knobs in CHOICES.values() for knob in knobs) == sorted(KNOBS)
    assert set(CHOICES) >= FOLLOWERS


@pytest.mark.parametrize(
    ("choice", "layout", "told"),
    [
        ("tp", Layout(tp=4), "4"),
        ("sp", Layout(sp=True), "on"),
        ("sp", Layout(), "off"),
        ("recompute", Layout(), "none"),
        ("recompute", Layout(recompute_granularity="selective"), "selective"),
        (
            "recompute",
            Layout(recompute_granularity="selective", recompute_modules="layernorm+moe_act"),
            "layernorm+moe_act",
        ),
        (
            "recompute",
            Layout(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
            "full:block:2",
        ),
        ("layer split", Layout(), "even"),
        ("layer split", Layout(num_layers_in_first_pipeline_stage=3), "first 3"),
        ("layer split", Layout(account_for_loss_in_pipeline_split=True), "loss counts"),
    ],
)
def test_a_value_is_told_as_a_person_reads_it(choice: str, layout: Layout, told: str) -> None:
    assert value_of(choice, layout) == told


@given(ROWS, ROWS)
def test_two_rows_have_the_same_code_exactly_where_they_take_the_same_value(one: int, other: int) -> None:
    codes = codes_of(TABLE)
    differs = {choice for choice, apart in zip(CHOICES, codes[one] != codes[other], strict=True) if apart}
    assert differs == _moved(LAYOUTS[one], LAYOUTS[other])


@given(ROWS)
def test_rows_one_step_away_differ_in_the_choice_and_the_fewest_followers(row: int) -> None:
    names, seen = list(CHOICES), set[int]()
    for choice, rows in one_step(codes_of(TABLE), row):
        name = names[choice]
        assert not seen & set(rows.tolist()), "a row is reached by one choice only"
        seen |= set(rows.tolist())
        moved = [_moved(LAYOUTS[row], LAYOUTS[other]) for other in rows]
        assert all(name in each and each - {name} <= FOLLOWERS for each in moved)
        (value,) = {value_of(name, LAYOUTS[other]) for other in rows}
        rivals = [
            each
            for layout in LAYOUTS
            if value_of(name, layout) == value
            and (each := _moved(LAYOUTS[row], layout)) - {name} <= FOLLOWERS
        ]
        assert {len(each) for each in moved} == {min(map(len, rivals))}


@given(ROWS)
def test_every_row_that_differs_in_one_choice_alone_is_one_step_away(row: int) -> None:
    found = {int(other) for _, rows in one_step(codes_of(TABLE), row) for other in rows}
    alone = {other for other, layout in enumerate(LAYOUTS) if len(_moved(LAYOUTS[row], layout)) == 1}
    assert alone <= found
    assert row not in found


def test_what_a_change_forces_follows() -> None:
    start = Layout(tp=2, sp=True, etp=2, pp=2, vpp=2, overlap_p2p_comm=True)
    row = find_row(TABLE, start)
    assert row is not None
    names = list(CHOICES)
    steps = {
        (names[choice], value_of(names[choice], LAYOUTS[rows[0]])): _moved(start, LAYOUTS[rows[0]])
        for choice, rows in one_step(codes_of(TABLE), row)
    }
    assert steps["tp", "1"] == {"tp", "sp", "etp"}
    assert steps["pp", "1"] == {"pp", "vpp", "overlap_p2p_comm"}
    assert steps["vpp", "1"] == {"vpp", "overlap_p2p_comm"}
    assert steps["micro_batch_size", "2"] == {"micro_batch_size"}


def test_a_table_of_one_row_has_no_neighbours() -> None:
    assert list(one_step(codes_of(TABLE.iloc[[0]]), 0)) == []
    assert np.array_equal(codes_of(TABLE.iloc[[0]]), np.zeros((1, len(CHOICES))))
