"""Pruning without a run: only rows that differ upwards in memory, and all of those."""

from dataclasses import fields

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.replay import memory_gib, sweep_of, table_of
from tuner.layout import KNOBS, Layout
from tuner.search.dominance import needs_at_least_as_much_memory
from tuner.search.sampler import find_row, layout_at

TABLE = table_of(
    sweep_of(
        knobs={
            "tp": [1, 2],
            "pp": [1, 2],
            "sp": [False, True],
            "micro_batch_size": [1, 2, 4, 8],
            "use_distributed_optimizer": [True, False],
            "overlap_grad_reduce": [False, True],
            "recompute_granularity": ["none", "selective", "full"],
            "recompute_method": ["none", "uniform", "block"],
            "recompute_num_layers": [0, 1],
        }
    )
)
RECOMPUTE = {field.name for field in fields(Layout) if field.name.startswith("recompute_")}
LAYOUTS = [layout_at(TABLE, row) for row in range(len(TABLE))]
ROWS = st.integers(0, len(TABLE) - 1)


def _needs_no_less(other: Layout, layout: Layout) -> bool:
    """The definition, one layout at a time."""
    moved = {knob for knob in KNOBS if getattr(other, knob) != getattr(layout, knob)}
    upwards = other.micro_batch_size >= layout.micro_batch_size
    if moved & RECOMPUTE:
        upwards &= other.recompute_granularity == "none"
    if "use_distributed_optimizer" in moved:
        upwards &= layout.use_distributed_optimizer
    return upwards and moved <= {"micro_batch_size", "use_distributed_optimizer"} | RECOMPUTE


@given(ROWS)
def test_exactly_the_rows_that_differ_only_upwards_are_ruled_out(row: int) -> None:
    layout = layout_at(TABLE, row)
    mask = needs_at_least_as_much_memory(TABLE, layout)
    expected = [_needs_no_less(other, layout) for other in LAYOUTS]
    assert mask.tolist() == expected
    assert mask[row]


@given(ROWS, ROWS)
def test_two_layouts_rule_each_other_out_only_if_they_are_one(first: int, second: int) -> None:
    one, other = layout_at(TABLE, first), layout_at(TABLE, second)
    both = (
        needs_at_least_as_much_memory(TABLE, one)[second]
        and needs_at_least_as_much_memory(TABLE, other)[first]
    )
    assert both == (one == other)


@given(ROWS)
def test_what_a_ruled_out_row_rules_out_is_ruled_out_already(row: int) -> None:
    mask = needs_at_least_as_much_memory(TABLE, layout_at(TABLE, row))
    for other in np.flatnonzero(mask):
        beyond = needs_at_least_as_much_memory(TABLE, layout_at(TABLE, int(other)))
        assert not (beyond & ~mask).any()


@given(ROWS)
def test_no_ruled_out_row_needs_less_by_the_replays_formula(row: int) -> None:
    layout = layout_at(TABLE, row)
    for other in np.flatnonzero(needs_at_least_as_much_memory(TABLE, layout)):
        assert memory_gib(layout_at(TABLE, int(other))) >= memory_gib(layout)


def test_a_layout_outside_the_table_rules_out_what_lies_above_it() -> None:
    outside = Layout(tp=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
    assert find_row(TABLE, outside) is None
    mask = needs_at_least_as_much_memory(TABLE, outside)
    ruled_out = [layout_at(TABLE, int(row)) for row in np.flatnonzero(mask)]
    assert {layout.recompute_granularity for layout in ruled_out} == {"none"}
    assert {layout.micro_batch_size for layout in ruled_out} >= {1, 2, 4}
