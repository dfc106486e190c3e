"""Choices: each has its own knobs, a value that a person can read, and rows that are one step apart by it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layouts import cluster, mixture, workload
from tuner.core.choices import CHOICES, FOLLOWERS, Steps, codes_of, one_step, value_of
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
CODES = codes_of(TABLE)
NAMES = list(CHOICES)
VALUES = [
    {choice: value_of(choice, layout_at(TABLE, row)) for choice in CHOICES} for row in range(len(TABLE))
]
ROWS = st.integers(0, len(TABLE) - 1)


def differences(left: int, right: int) -> set[str]:
    """Return the choices in which two rows differ."""
    return {choice for choice in CHOICES if VALUES[left][choice] != VALUES[right][choice]}


def test_every_knob_belongs_to_one_choice() -> None:
    assert sorted(knob for knobs in CHOICES.values() for knob in knobs) == sorted(KNOBS)
    assert set(CHOICES) >= FOLLOWERS


@pytest.mark.parametrize(
    ("choice", "layout", "value"),
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
def test_a_value_is_written_for_a_person(choice: str, layout: Layout, value: str) -> None:
    assert value_of(choice, layout) == value


@given(ROWS, ROWS)
def test_two_rows_have_equal_codes_exactly_where_they_take_equal_values(row: int, other: int) -> None:
    differ = zip(CHOICES, CODES[row] != CODES[other], strict=True)
    assert {choice for choice, differs in differ if differs} == differences(row, other)


@given(ROWS)
def test_rows_one_step_away_differ_in_the_choice_and_the_fewest_followers(row: int) -> None:
    reached = set[int]()
    for choice, rows in one_step(CODES, row):
        name = NAMES[choice]
        assert not reached & set(rows.tolist()), "a row is reached by one choice only"
        reached |= set(rows.tolist())
        changes = [differences(row, other) for other in rows]
        assert all(name in changed and changed - {name} <= FOLLOWERS for changed in changes)
        (value,) = {VALUES[other][name] for other in rows}
        possible = [differences(row, other) for other, values in enumerate(VALUES) if values[name] == value]
        fewest = min(len(changed) for changed in possible if changed - {name} <= FOLLOWERS)
        assert {len(changed) for changed in changes} == {fewest}


@given(ROWS)
def test_every_row_that_differs_in_one_choice_alone_is_one_step_away(row: int) -> None:
    reached = {int(other) for _, rows in one_step(CODES, row) for other in rows}
    alone = {other for other in range(len(TABLE)) if len(differences(row, other)) == 1}
    assert alone <= reached
    assert row not in reached


def test_a_change_forces_its_followers() -> None:
    row = find_row(TABLE, Layout(tp=2, sp=True, etp=2, pp=2, vpp=2, overlap_p2p_comm=True))
    assert row is not None
    steps = {
        (NAMES[choice], VALUES[rows[0]][NAMES[choice]]): differences(row, rows[0])
        for choice, rows in one_step(CODES, row)
    }
    assert steps["tp", "1"] == {"tp", "sp", "etp"}
    assert steps["pp", "1"] == {"pp", "vpp", "overlap_p2p_comm"}
    assert steps["vpp", "1"] == {"vpp", "overlap_p2p_comm"}
    assert steps["micro_batch_size", "2"] == {"micro_batch_size"}


def test_a_table_of_one_row_has_no_neighbours() -> None:
    assert list(one_step(codes_of(TABLE.iloc[[0]]), 0)) == []
    assert np.array_equal(codes_of(TABLE.iloc[[0]]), np.zeros((1, len(CHOICES))))


@given(ROWS)
def test_steps_around_a_row_are_its_rows_one_step_away(row: int) -> None:
    found, wanted = list(Steps(CODES).around(row)), list(one_step(CODES, row))
    assert [choice for choice, _ in found] == [choice for choice, _ in wanted]
    for (_, rows), (_, others) in zip(found, wanted, strict=True):
        assert rows.tolist() == others.tolist()
