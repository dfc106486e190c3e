"""The layout: its defaults, its label, and the sizes derived from it."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replay import sweep_of, table_of
from tuner.core.layout import (
    DEFAULTS,
    ENVIRONMENT_KNOBS,
    KNOBS,
    Layout,
    data_parallel_size,
    expert_data_parallel_size,
    layout_from,
    min_gpus,
    module_names,
    num_microbatches,
    recomputed_modules,
)
from tuner.files import parse, to_data
from tuner.space.table import layout_at

SIZES = st.sampled_from([1, 2, 3, 4, 8])


@pytest.mark.parametrize(
    ("knobs", "label"),
    [
        ({}, "tp1 pp1 mbs1"),
        ({"tp": 2, "pp": 4, "micro_batch_size": 2, "sp": True}, "tp2 pp4 sp mbs2"),
        ({"vpp": 2, "cp": 4, "ep": 8}, "tp1 pp1 vpp2 cp4 ep8 mbs1"),
        (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            "tp1 pp1 mbs1 rc=full:uniform:1",
        ),
        ({"recompute_granularity": "selective"}, "tp1 pp1 mbs1 rc=selective"),
        (
            {"recompute_granularity": "selective", "recompute_modules": "core_attn+mlp"},
            "tp1 pp1 mbs1 rc=core_attn+mlp",
        ),
    ],
)
def test_the_label_has_the_knobs_that_differ_from_their_default(knobs: dict[str, object], label: str) -> None:
    assert layout_from(knobs).label() == label


def test_no_two_layouts_of_a_table_share_a_label() -> None:
    table = table_of(sweep_of())
    labels = [layout_at(table, row).label() for row in range(len(table))]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("knob", [name for name in KNOBS if isinstance(DEFAULTS[name], bool)])
def test_every_switch_shows_in_the_label(knob: str) -> None:
    switched = layout_from({knob: not DEFAULTS[knob]})
    assert switched.label() != Layout().label()
    assert ("no-" in switched.label()) == DEFAULTS[knob]


def test_every_knob_has_the_names_that_megatron_gives_it() -> None:
    for knob in fields(Layout):
        assert knob.metadata["flag"].startswith("--") is (knob.name not in ENVIRONMENT_KNOBS)
        assert knob.metadata["megatron"]
    names = [knob.metadata["megatron"] for knob in fields(Layout)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("knob", ["tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size"])
def test_a_size_below_one_is_refused(knob: str) -> None:
    with pytest.raises(ValueError, match=f"{knob} must be at least 1, not 0"):
        layout_from({knob: 0})


@pytest.mark.parametrize("knob", ["num_layers_in_first_pipeline_stage", "recompute_num_layers"])
def test_a_count_below_zero_is_refused(knob: str) -> None:
    with pytest.raises(ValueError, match=rf"{knob} must be at least 0 \(0 leaves it to Megatron\), not -1"):
        layout_from({knob: -1})


def test_a_table_row_becomes_plain_python() -> None:
    row = {"tp": np.int16(2), "sp": np.bool_(True), "recompute_granularity": "full", "dp": np.int32(9)}
    layout = layout_from(row)
    assert layout == Layout(tp=2, sp=True, recompute_granularity="full")
    assert (type(layout.tp), type(layout.sp)) == (int, bool)
    assert parse(Layout, to_data(layout), "a") == layout


@given(SIZES, SIZES, SIZES, SIZES, SIZES, st.integers(1, 6))
def test_the_derived_sizes_cover_the_world_exactly(
    tp: int, pp: int, cp: int, ep: int, etp: int, times: int
) -> None:
    stage = int(np.lcm(tp * cp, ep * etp))
    world = pp * stage * times
    dp, edp = data_parallel_size(world, tp, pp, cp), expert_data_parallel_size(world, pp, ep, etp)
    assert tp * pp * cp * dp == pp * ep * etp * edp == world
    assert world >= min_gpus(tp, pp, cp, ep, etp)


@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_the_fewest_gpus_hold_the_larger_of_both_grids(tp: int, pp: int, cp: int, ep: int, etp: int) -> None:
    needed = min_gpus(tp, pp, cp, ep, etp)
    assert needed == max(tp * pp * cp, pp * ep * etp)
    columns = [np.array([value]) for value in (tp, pp, cp, ep, etp)]
    assert min_gpus(*columns).tolist() == [needed]


@given(st.integers(1, 512), st.integers(1, 16), st.integers(1, 64))
def test_the_micro_batches_of_all_ranks_add_up_to_the_global_batch(
    count: int, micro_batch_size: int, dp: int
) -> None:
    assert num_microbatches(count * micro_batch_size * dp, micro_batch_size, dp) == count


def test_a_text_of_modules_is_divided_into_their_names() -> None:
    assert tuple(module_names("none")) == ()
    assert tuple(module_names("core_attn+mlp")) == ("core_attn", "mlp")


def test_selective_recompute_drops_core_attention_by_default() -> None:
    assert tuple(recomputed_modules("none")) == ("core_attn",)
    assert tuple(recomputed_modules("layernorm+mlp")) == ("layernorm", "mlp")
