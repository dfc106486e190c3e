"""Pruning without a run rules out only rows that provably need no less memory, and on plain knobs all such rows."""

from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search_spaces.loader import load_cluster, load_model
from tests.replay import memory_gib, sweep_of, table_of
from tests.unit import layouts
from tuner.core.cluster import Cluster
from tuner.core.layout import KNOBS, Layout
from tuner.core.workload import Model, Workload
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.overhead import beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import peak_gib
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import find_row, layout_at

KNOB_VALUES: dict[str, list[Any]] = {
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
SWEEP = sweep_of(knobs=KNOB_VALUES)
TABLE = table_of(SWEEP)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOVING = set(KNOB_VALUES)
RECOMPUTE = {field.name for field in fields(Layout) if field.name.startswith("recompute_")}
LAYOUTS = [layout_at(TABLE, row) for row in range(len(TABLE))]
ROWS = st.integers(0, len(TABLE) - 1)


@cache
def _ruled_out(layout: Layout) -> NDArray[np.bool_]:
    """Return the rows of TABLE that the layout rules out."""
    return needs_at_least_as_much_memory(TABLE, layout, SWEEP.workload, SWEEP.cluster)


def _differs_only_upwards(other: Layout, layout: Layout) -> bool:
    """Whether `other` provably needs no less memory than `layout` by the definition, for the knobs of TABLE."""
    moved = {knob for knob in MOVING if getattr(other, knob) != getattr(layout, knob)}
    upwards = other.micro_batch_size >= layout.micro_batch_size
    if moved & RECOMPUTE:
        # The model has four layers, so a stage of two recomputes one at a time.
        upwards &= other.recompute_granularity == "none"
    if "use_distributed_optimizer" in moved:
        upwards &= layout.use_distributed_optimizer
    # On CUDA two stages do not merge into one, which would be no pipeline.
    return upwards and moved <= {"micro_batch_size", "use_distributed_optimizer"} | RECOMPUTE


@settings(max_examples=30)
@given(ROWS)
def test_exactly_the_rows_that_differ_only_upwards_are_ruled_out(row: int) -> None:
    ruled_out = _ruled_out(LAYOUTS[row])
    assert ruled_out.tolist() == [_differs_only_upwards(other, LAYOUTS[row]) for other in LAYOUTS]
    assert ruled_out[row]


def test_two_layouts_rule_each_other_out_only_if_they_are_equal() -> None:
    rules_out = np.array([_ruled_out(layout) for layout in LAYOUTS])
    assert np.array_equal(rules_out & rules_out.T, np.eye(len(LAYOUTS), dtype=bool))


def test_no_ruled_out_row_needs_less_by_the_formula_of_the_replay() -> None:
    needed_gib = np.array([memory_gib(layout) for layout in LAYOUTS])
    for row, layout in enumerate(LAYOUTS):
        assert (needed_gib[_ruled_out(layout)] >= needed_gib[row]).all()


def test_a_layout_outside_the_table_rules_out_the_rows_above_it() -> None:
    outside = Layout(tp=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
    assert find_row(TABLE, outside) is None
    ruled_out = [layout_at(TABLE, int(row)) for row in np.flatnonzero(_ruled_out(outside))]
    assert {layout.recompute_granularity for layout in ruled_out} == {"none"}
    assert {layout.micro_batch_size for layout in ruled_out} >= {1, 2, 4}


def _cuda(gpus: int) -> Cluster:
    return replace(load_cluster("dgx-h100"), nodes=gpus // 8)


def _cpu(ranks: int) -> Cluster:
    return replace(load_cluster("cpu-4"), gpus_per_node=ranks, nvlink_domain_gpus=ranks)


TINY = layouts.dense(hidden_size=256, ffn_hidden_size=1024, kv_channels=32, num_layers=16)
CASES: dict[str, tuple[str | Model, int, int, Cluster]] = {
    "llama3-8b on 64 GPUs": ("llama3-8b", 8192, 64, _cuda(64)),
    "gpt3-175b on 64 GPUs": ("gpt3-175b", 2048, 128, _cuda(64)),
    "llama3.2-1b on 64 CPU ranks": ("llama3.2-1b", 4096, 64, _cpu(64)),
    "tiny-gpt on 4 CPU ranks": ("tiny-gpt", 128, 16, _cpu(4)),
    "a tiny one on 16 CPU ranks": (TINY, 64, 32, _cpu(16)),
    "olmoe-7b on 16 GPUs": ("olmoe-7b", 4096, 64, _cuda(16)),
    "moonlight-16b on 16 GPUs": ("moonlight-16b", 4096, 32, _cuda(16)),
    "tiny-moe on 4 CPU ranks": ("tiny-moe", 128, 16, _cpu(4)),
    "tiny-mla on 4 CPU ranks": ("tiny-mla", 128, 16, _cpu(4)),
}
VARIED = ("tp", "pp", "vpp", "cp", "ep", "etp", "sp", "micro_batch_size", "overlap_p2p_comm")


@cache
def _case(name: str) -> tuple[Workload, Cluster, pd.DataFrame, NDArray[np.float64]]:
    """Return a workload, its cluster, at most 10,000 valid layouts evenly taken, and their predicted peaks in GiB."""
    model, sequence, batch, cluster = CASES[name]
    workload = Workload(
        model=load_model(model) if isinstance(model, str) else model,
        seq_length=sequence,
        global_batch_size=batch,
        precision="fp32" if cluster.device == "cpu" else "bf16",
    )
    domain = default_domain(workload, cluster)
    varied = {knob: domain[knob] for knob in (*VARIED, "use_distributed_optimizer", *RECOMPUTE)}
    table = enumerate_layouts(workload, cluster, varied | {"recompute_num_layers": (0, 1, 2)}).table
    table = table.iloc[:: 1 + len(table) // 10_000].reset_index(drop=True)
    return workload, cluster, table, peak_gib(table, workload, cluster, implementation_of(cluster))


@pytest.mark.parametrize("case", list(CASES))
@settings(max_examples=50)
@given(data=st.data())
def test_no_ruled_out_row_is_predicted_to_need_less(case: str, data: st.DataObject) -> None:
    workload, cluster, table, peaks_gib = _case(case)
    row = data.draw(st.integers(0, len(table) - 1))
    ruled_out = needs_at_least_as_much_memory(table, layout_at(table, row), workload, cluster)
    assert ruled_out[row]
    assert (peaks_gib[ruled_out] >= peaks_gib[row] * (1 - 1e-12)).all()


RARER: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2),
    "pp": (1, 2, 4, 8),
    "vpp": (1, 2),
    "cp": (1, 2),
    "micro_batch_size": (1, 2, 4),
    "pipeline_model_parallel_layout": ("none", "Et*9|t*9|t*8|t*6L", "Et*4|(t*4|)*5t*5|t*3L"),
    "cp_comm_type": ("p2p", "all_gather", "a2a"),
    "recompute_granularity": ("none", "selective", "full"),
    "recompute_method": ("none", "uniform"),
    "recompute_num_layers": (0, 1, 2),
    "use_distributed_optimizer": (True, False),
    "cuda_graph_impl": ("none", "transformer_engine"),
    "use_megatron_fsdp": (False, True),
    "data_parallel_sharding_strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
    "overlap_grad_reduce": (False, True),
    "overlap_param_gather": (False, True),
    "cpu_offloading_num_layers": (0, 8, 16),
    "nccl_ub": (False, True),
    "expandable_segments": (False, True),
    "nccl_nvls_enable": (True, False),
}


@cache
def _rarer() -> tuple[Workload, Cluster, pd.DataFrame, NDArray[np.float64]]:
    """Return a workload, its cluster, valid layouts of knobs outside the grid, and their predicted total in GiB."""
    workload, cluster, _, _ = _case("llama3-8b on 64 GPUs")
    table = enumerate_layouts(workload, cluster, RARER).table
    table = table.sample(min(len(table), 20_000), random_state=0).reset_index(drop=True)
    reserved_gib = peak_gib(table, workload, cluster) * reserved_ratio(table, cluster)
    return workload, cluster, table, reserved_gib + beyond_allocated_gib(table, workload, cluster)


@settings(max_examples=100)
@given(data=st.data())
def test_no_ruled_out_row_of_the_rarer_knobs_is_predicted_to_need_less(data: st.DataObject) -> None:
    workload, cluster, table, total_gib = _rarer()
    row = data.draw(st.integers(0, len(table) - 1))
    ruled_out = needs_at_least_as_much_memory(table, layout_at(table, row), workload, cluster)
    assert ruled_out[row]
    assert (total_gib[ruled_out] >= total_gib[row] * (1 - 1e-12)).all()


@pytest.mark.parametrize(
    ("layout", "other", "expected"),
    [
        ({"nccl_nvls_enable": False}, {}, True),
        ({}, {"nccl_nvls_enable": False}, False),
        ({"cpu_offloading_num_layers": 8}, {}, True),
        ({"cpu_offloading_num_layers": 8}, {"cpu_offloading_num_layers": 4}, False),
        ({}, {"cpu_offloading_num_layers": 8}, False),
        # These are almost sure to need more, which is no proof.
        ({"expandable_segments": True}, {}, False),
        ({}, {"cuda_graph_impl": "local"}, False),
        ({"use_megatron_fsdp": True, "data_parallel_sharding_strategy": "optim_grads_params"}, {}, False),
        # Stages that are written out do not merge. They may lose their recompute if each has enough layers.
        ({"pp": 4, "pipeline_model_parallel_layout": "Et*9|t*9|t*8|t*6L"}, {"pp": 2}, False),
        (
            {"pp": 4, "pipeline_model_parallel_layout": "Et*9|t*9|t*8|t*6L", **FULL},
            {"pp": 4, "pipeline_model_parallel_layout": "Et*9|t*9|t*8|t*6L"},
            True,
        ),
        (
            {"pp": 4, "pipeline_model_parallel_layout": "Et*10|t*11|t*10|tL", **FULL},
            {"pp": 4, "pipeline_model_parallel_layout": "Et*10|t*11|t*10|tL"},
            False,
        ),
    ],
)
def test_rarer_knobs_rule_out_only_what_is_proven(layout: Any, other: Any, expected: bool) -> None:
    assert _rules_out(Layout(**other), Layout(**layout), "llama3-8b on 64 GPUs") is expected


def _rules_out(other: Layout, layout: Layout, case: str) -> bool:
    workload, cluster, _, _ = _case(case)
    row = pd.DataFrame([{knob: getattr(other, knob) for knob in KNOBS}])
    return bool(needs_at_least_as_much_memory(row, layout, workload, cluster)[0])


@pytest.mark.parametrize(
    ("layout", "other", "expected"),
    [
        # Half as many stages have twice the layers each, also with a larger micro-batch or without recompute.
        ({"pp": 8}, {"pp": 4}, True),
        ({"pp": 8}, {"pp": 2, "micro_batch_size": 2}, True),
        ({"pp": 8, **FULL}, {"pp": 4}, True),
        ({"pp": 8, **FULL}, {"pp": 4, **FULL}, True),
        ({"pp": 4}, {"pp": 8}, False),
        ({"pp": 8, "micro_batch_size": 2}, {"pp": 4}, False),
        ({"pp": 8}, {"pp": 4, "tp": 2}, False),
        # Without a pipeline NCCL has no buffers for its messages.
        ({"pp": 2}, {"pp": 1}, False),
        # Chunks and checkpoints of several layers do not merge.
        ({"pp": 8, "vpp": 2}, {"pp": 4, "vpp": 2}, False),
        ({"pp": 8, **FULL, "recompute_num_layers": 2}, {"pp": 4, **FULL, "recompute_num_layers": 2}, False),
        # A stage of one layer: recomputing it brings back all that it would have kept, and its output.
        ({"pp": 32, **FULL}, {"pp": 32}, False),
        ({"pp": 16, **FULL}, {"pp": 16}, True),
    ],
)
def test_merged_stages_need_no_less(layout: Any, other: Any, expected: bool) -> None:
    assert _rules_out(Layout(**other), Layout(**layout), "llama3-8b on 64 GPUs") is expected


def test_on_cpu_a_pipeline_may_merge_into_a_single_stage() -> None:
    assert _rules_out(Layout(), Layout(pp=2), "llama3.2-1b on 64 CPU ranks")


def test_stages_of_a_mixture_do_not_merge_since_tokens_follow_the_routing() -> None:
    assert not _rules_out(Layout(pp=2), Layout(pp=4), "olmoe-7b on 16 GPUs")


def test_stages_do_not_merge_if_the_vocabulary_outweighs_the_layers_that_are_added() -> None:
    workload, cluster, _, _ = _case("tiny-gpt on 4 CPU ranks")
    row = pd.DataFrame([{knob: getattr(Layout(pp=2), knob) for knob in KNOBS}])
    small = replace(workload, model=replace(workload.model, vocab_size=1024))
    large = replace(workload, model=replace(workload.model, vocab_size=16_384))
    assert needs_at_least_as_much_memory(row, Layout(pp=4), small, cluster)[0]
    assert not needs_at_least_as_much_memory(row, Layout(pp=4), large, cluster)[0]


def test_torch_keeps_tables_per_micro_batch_so_few_large_ones_may_need_less() -> None:
    case = "tiny-gpt on 4 CPU ranks"
    # 16 samples make 16 micro-batches of 1, 4 of 4, or 2 of 8; with pp 4, two do not fill the pipeline.
    assert _rules_out(Layout(pp=4, micro_batch_size=4), Layout(pp=4), case)
    assert not _rules_out(Layout(pp=4, micro_batch_size=8), Layout(pp=4), case)
    fused = "llama3-8b on 64 GPUs"
    assert _rules_out(Layout(pp=8, micro_batch_size=8), Layout(pp=8), fused)
