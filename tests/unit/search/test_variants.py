"""The variants of a layout: all valid ones of its grid, or those a few choices away if there are too many."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.search.default_sweeps import (
    built_in_grid,
    built_in_sweep,
    default_sweep,
    layout_key,
    layout_keys,
)
from tuner.core.choices import codes_of
from tuner.core.layout import KNOBS, Layout
from tuner.search.variants import refined_values, variants_of
from tuner.space.domain import REFINED
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import layout_at

GRID_KNOBS = [knob for knob in KNOBS if knob not in REFINED]
UNLIMITED = 10**9


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-moe"])
@settings(max_examples=8)
@given(data=st.data())
def test_the_variants_of_a_layout_are_every_other_valid_layout_of_its_grid(
    name: str, data: st.DataObject
) -> None:
    sweep, grid = built_in_sweep(name), built_in_grid(name)
    layout = layout_at(grid, data.draw(st.integers(0, len(grid) - 1)))
    variants = variants_of(layout, sweep.problem, most_products=UNLIMITED)
    domain = refined_values(layout, sweep.workload, sweep.cluster, sweep.refined)
    fixed = {knob: getattr(layout, knob) for knob in KNOBS if knob not in domain}
    valid = enumerate_layouts(sweep.workload, sweep.cluster, domain, fixed).table
    assert variants.changes is None
    assert len(layout_keys(variants.table)) == len(variants.table) > 0
    assert layout_keys(variants.table) == layout_keys(valid) - {layout_key(layout)}
    for knob in GRID_KNOBS:
        assert set(variants.table[knob]) == {getattr(layout, knob)}


@settings(max_examples=5)
@given(row=st.integers(0, len(built_in_grid("tiny-moe")) - 1))
def test_with_too_many_combinations_only_a_few_choices_change_at_once(row: int) -> None:
    problem, layout = built_in_sweep("tiny-moe").problem, layout_at(built_in_grid("tiny-moe"), row)
    unlimited = variants_of(layout, problem, most_products=UNLIMITED).table
    limited = variants_of(layout, problem, most_products=1, most_changes=2)
    itself = pd.DataFrame([dict(zip(KNOBS, layout_key(layout), strict=True))])
    codes = codes_of(pd.concat([itself, unlimited]))
    changes = (codes[1:] != codes[0]).sum(axis=1)
    assert limited.changes == 2
    assert layout_keys(limited.table) == layout_keys(unlimited[changes <= 2])


def test_on_many_gpus_a_layout_has_few_variants() -> None:
    sweep, grid = built_in_sweep("qwen3-30b-a3b"), built_in_grid("qwen3-30b-a3b")
    for row in range(0, len(grid), len(grid) // 10):
        assert len(variants_of(layout_at(grid, row), sweep.problem).table) < 30_000


def test_what_a_sweep_file_fixes_does_not_vary() -> None:
    sweep = default_sweep(fixed={"overlap_grad_reduce": False, "overlap_param_gather": False})
    variants = variants_of(Layout(tp=2, sp=True), sweep.problem).table
    assert set(variants["overlap_grad_reduce"]) <= {False}
