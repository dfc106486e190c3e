"""Every knob changes the predictions, in the direction that its mechanism implies."""

from dataclasses import asdict, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.loader import load_cluster, load_model
from tests.unit.layouts import dense, latent, workload
from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Floats
from tuner.core.layout import KNOBS, Layout, data_parallel_size
from tuner.core.pipeline_layout import write
from tuner.core.workload import Workload
from tuner.predict.memory.attention import attention
from tuner.predict.memory.mlp import dense_mlp, experts_mlp
from tuner.predict.memory.overhead import beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import GIB, StageMemory, memory_breakdown, peak_gib
from tuner.predict.memory.share import RankShare
from tuner.predict.memory.stages import DENSE, MOE, stages_in_flight
from tuner.predict.time.stages import layers_by_rank
from tuner.predict.time.step import StepTime, step_breakdown, step_parts_ms, step_time_ms

H100 = replace(load_cluster("dgx-h100"), nodes=4)
NODE = replace(H100, nodes=1)
LLAMA = Workload(model=load_model("llama3-8b"), seq_length=8192, global_batch_size=128)
QWEN = Workload(model=load_model("qwen3-30b-a3b"), seq_length=4096, global_batch_size=256)
SHARED = Workload(model=load_model("moonlight-16b"), seq_length=4096, global_batch_size=256)
SMALL = replace(LLAMA, model=load_model("llama3.2-1b"), seq_length=1024)
MANY_KEYS = replace(LLAMA, model=replace(LLAMA.model, num_query_groups=32))
ODD = replace(LLAMA, model=replace(LLAMA.model, num_layers=31))
FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
FSDP: dict[str, Any] = {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": "optim_grads_params"}
GRAPHS: dict[str, Any] = {"cuda_graph_impl": "transformer_engine"}
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ACROSS: dict[str, Any] = {"ep": 16, "overlap_moe_expert_parallel_comm": True}
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")

BOTH = "time memory"
EMBEDDING, LOSS = (f"account_for_{what}_in_pipeline_split" for what in ("embedding", "loss"))

EFFECTS: dict[str, tuple[Workload, dict[str, Any], Any, str]] = {
    "tp": (LLAMA, {}, 2, "time memory beside"),
    "pp": (LLAMA, {}, 4, "time memory beside"),
    "vpp": (LLAMA, {"pp": 4}, 2, BOTH),
    "cp": (LLAMA, {}, 2, "time memory beside"),
    "ep": (QWEN, {}, 8, "time memory beside"),
    "etp": (QWEN, {}, 2, "time memory beside"),
    "sp": (LLAMA, {"tp": 4}, True, BOTH),
    "micro_batch_size": (LLAMA, {}, 2, BOTH),
    "num_layers_in_first_pipeline_stage": (LLAMA, {"pp": 2}, 10, BOTH),
    "num_layers_in_last_pipeline_stage": (LLAMA, {"pp": 2}, 10, BOTH),
    "account_for_embedding_in_pipeline_split": (
        ODD,
        {"pp": 4, LOSS: True},
        {EMBEDDING: True, LOSS: False},
        BOTH,
    ),
    "account_for_loss_in_pipeline_split": (
        ODD,
        {"pp": 4, EMBEDDING: True},
        {LOSS: True, EMBEDDING: False},
        BOTH,
    ),
    "microbatch_group_size_per_vp_stage": (LLAMA, {"pp": 4, "vpp": 2}, 8, "memory"),
    "pipeline_model_parallel_layout": (LLAMA, {"pp": 4}, "Et*9|t*9|t*8|t*6L", BOTH),
    "cp_comm_type": (MANY_KEYS, {"cp": 8, "pp": 4}, "all_gather", BOTH),
    "recompute_granularity": (LLAMA, {}, "selective", BOTH),
    "recompute_method": (LLAMA, {"pp": 4, **FULL}, "block", BOTH),
    "recompute_num_layers": (LLAMA, {**FULL, "pp": 4}, 2, "memory"),
    "recompute_modules": (LLAMA, {"recompute_granularity": "selective"}, "mlp", BOTH),
    "use_distributed_optimizer": (LLAMA, {}, False, BOTH),
    "overlap_grad_reduce": (LLAMA, {}, True, "time"),
    "overlap_param_gather": (LLAMA, {}, True, "time"),
    "overlap_p2p_comm": (LLAMA, {"pp": 4, "vpp": 2}, True, BOTH),
    "tp_comm_overlap": (LLAMA, {"tp": 4, "sp": True}, True, "time beside"),
    "moe_token_dispatcher_type": (QWEN, {"ep": 16}, "flex", "time memory beside"),
    "moe_flex_dispatcher_backend": (
        QWEN,
        {"ep": 16, "moe_token_dispatcher_type": "flex"},
        "hybridep",
        "beside",
    ),
    "moe_shared_expert_overlap": (SHARED, {"ep": 16}, True, "time"),
    "overlap_moe_expert_parallel_comm": (QWEN, {"ep": 16}, True, BOTH),
    "delay_wgrad_compute": (QWEN, ACROSS, True, "time"),
    "cuda_graph_impl": (SMALL, {"tp": 8, "sp": True}, "transformer_engine", BOTH),
    "cuda_graph_scope": (SMALL, {"tp": 8, "sp": True, **GRAPHS}, "attn", "time"),
    "use_megatron_fsdp": (
        LLAMA,
        {"data_parallel_sharding_strategy": "optim_grads_params"},
        True,
        BOTH,
    ),
    "data_parallel_sharding_strategy": (
        LLAMA,
        {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": "optim"},
        "optim_grads",
        BOTH,
    ),
    "cpu_offloading_num_layers": (LLAMA, {}, 16, BOTH),
    "nccl_ub": (LLAMA, {"pp": 8}, True, "time"),
    "cuda_device_max_connections": (LLAMA, {"tp": 4}, 8, "time"),
    "expandable_segments": (LLAMA, {}, True, "beside"),
    "nccl_nvls_enable": (LLAMA, {"tp": 4}, False, "time beside"),
}
"""For each knob: a workload, a layout, another value (or the values of the knob and of those that must move with it),
and what changes: step time ("time"), allocated memory ("memory"), memory beside it ("beside"). Knobs that only move
work in time need no memory. Variables of the environment do not reach the allocator, except the allocator's own. The
backend of the flex dispatcher changes the time only where NVLink spans nodes."""


def table_of(*layouts: Layout) -> pd.DataFrame:
    return pd.DataFrame([asdict(layout) for layout in layouts])


def predicted(workload: Workload, layout: Layout, cluster: Cluster = H100) -> dict[str, float]:
    table = table_of(layout)
    beyond_gib, ratio = beyond_allocated_gib(table, workload, cluster), reserved_ratio(table, cluster)
    return {
        "time": float(step_time_ms(table, workload, cluster)[0]),
        "memory": float(peak_gib(table, workload, cluster)[0]),
        "beside": float(beyond_gib[0]) + float(ratio[0]),
    }


def test_every_knob_is_listed() -> None:
    assert set(EFFECTS) == set(KNOBS)


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_changes_the_predictions_that_its_mechanism_concerns(knob: str) -> None:
    workload, knobs, value, expected = EFFECTS[knob]
    layout = Layout(**knobs)
    changes = value if isinstance(value, dict) else {knob: value}
    before, after = predicted(workload, layout), predicted(workload, replace(layout, **changes))
    assert before == predicted(workload, layout)
    changed = [name for name in before if after[name] != pytest.approx(before[name], rel=1e-6)]
    assert changed == expected.split()


def step(workload: Workload, cluster: Cluster = H100, /, **knobs: Any) -> StepTime:
    return step_breakdown(Layout(**knobs), workload, cluster)


def stage(workload: Workload, cluster: Cluster = H100, /, **knobs: Any) -> StageMemory:
    return memory_breakdown(Layout(**knobs), workload, cluster)[0]


@pytest.mark.parametrize(("tp", "micro_batch_size"), [(1, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("workload", [LLAMA, QWEN, SHARED], ids=lambda workload: workload.model.name)
def test_each_sharding_strategy_holds_no_more_of_the_model_and_moves_no_less(
    workload: Workload, tp: int, micro_batch_size: int
) -> None:
    plain_knobs: dict[str, Any] = {"tp": tp, "sp": tp > 1, "micro_batch_size": micro_batch_size}
    knobs = {**plain_knobs, "use_megatron_fsdp": True, **OVERLAP}
    held = [stage(workload, **knobs, data_parallel_sharding_strategy=strategy) for strategy in STRATEGIES]
    for before, after in pairwise(held):
        assert after.parameters_gib <= before.parameters_gib
        assert after.gradients_gib <= before.gradients_gib
        assert after.optimizer_gib <= before.optimizer_gib
    assert held[-1].parameters_gib <= stage(workload, **plain_knobs).parameters_gib
    sharding = [Layout(**(knobs | {"data_parallel_sharding_strategy": name})) for name in STRATEGIES[1:]]
    exposed_ms = step_parts_ms(table_of(*sharding), workload, H100)["dp_ms"]
    assert exposed_ms.is_monotonic_increasing


def test_fsdp_holds_its_shards_and_a_few_layers_whole() -> None:
    ranks, layers = H100.world_size, LLAMA.model.num_layers
    plain = stage(LLAMA)
    full = stage(LLAMA, **FSDP)
    assert full.parameters_gib == pytest.approx(plain.parameters_gib / ranks)
    assert full.gradients_gib == pytest.approx(plain.gradients_gib / ranks)
    assert full.optimizer_gib == pytest.approx(plain.optimizer_gib)
    # Whole are two layers and 500 million weights ahead, and the two tables of the vocabulary one after the other.
    table = LLAMA.model.padded_vocab_size(1) * LLAMA.model.hidden_size
    layer = (plain.parameters_gib * GIB / 2 - table) / layers
    whole = 2 * (2 * layer + 500e6 + table) + 4 * (2 * layer + table)
    assert (full.buffers_gib - plain.buffers_gib) * GIB == pytest.approx(whole, rel=1e-6)
    registered = stage(LLAMA, **FSDP, nccl_ub=True)
    assert (full.buffers_gib - registered.buffers_gib) * GIB == pytest.approx(2 * 500e6)


def test_fsdp_gathers_the_weights_twice_per_micro_batch() -> None:
    few, many = (step(LLAMA, **FSDP, micro_batch_size=size).dp_ms for size in (4, 1))
    assert many / few == pytest.approx(4, rel=0.5)
    hidden = step(LLAMA, NODE, **FSDP, micro_batch_size=4)
    assert hidden.dp_ms < 0.2 * hidden.total_ms


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_offloading_more_layers_keeps_no_more_and_waits_no_less(micro_batch_size: int) -> None:
    counts = range(LLAMA.model.num_layers)
    table = table_of(
        *(Layout(cpu_offloading_num_layers=count, micro_batch_size=micro_batch_size) for count in counts)
    )
    assert (np.diff(peak_gib(table, LLAMA, H100)) <= 0).all()
    assert (np.diff(step_time_ms(table, LLAMA, H100)) >= 0).all()


def test_offloaded_layers_leave_one_at_a_time_and_a_slow_link_shows() -> None:
    none, half = stage(LLAMA), stage(LLAMA, cpu_offloading_num_layers=16)
    share = RankShare(Columns.single(Layout()), LLAMA, "transformer_engine", 1.0)
    layer = float(attention(share).kept[0] + dense_mlp(share).kept[0])
    kept = [part.attention_gib + part.dense_mlp_gib for part in (none, half)]
    assert (kept[0] - kept[1]) * GIB == pytest.approx(15 * layer)
    assert step(LLAMA, cpu_offloading_num_layers=1).offload_ms == 0  # The passes hide its transfer.
    assert step(LLAMA, cpu_offloading_num_layers=31).offload_ms > 0


@pytest.mark.parametrize("workload", [LLAMA, SMALL, QWEN, SHARED], ids=lambda workload: workload.model.name)
def test_graphs_never_launch_slower_and_never_hold_less(workload: Workload) -> None:
    eager = [Layout(tp=tp, sp=tp > 1) for tp in (1, 2, 8)]
    eager_parts, eager_gib = step_parts_ms(table_of(*eager), workload, H100), _peaks_gib(eager, workload)
    scopes = ("none", "attn", "attn+mlp", "attn+moe_router+moe_preprocess")
    for scope, kind in product(scopes, ("transformer_engine", "local")):
        graphs: dict[str, Any] = {"cuda_graph_impl": kind, "cuda_graph_scope": scope}
        graphed = [replace(layout, **graphs) for layout in eager]
        parts = step_parts_ms(table_of(*graphed), workload, H100)
        assert (parts["host_ms"] <= eager_parts["host_ms"]).all()
        assert (parts.sum(axis=1) <= eager_parts.sum(axis=1)).all()
        assert (_peaks_gib(graphed, workload) >= eager_gib).all()


def _peaks_gib(layouts: list[Layout], workload: Workload) -> Floats:
    return peak_gib(table_of(*layouts), workload, H100)


def test_a_graph_of_the_whole_iteration_leaves_the_host_nothing_to_launch() -> None:
    eager = step(SMALL, tp=8, sp=True)
    whole = step(SMALL, tp=8, sp=True, cuda_graph_impl="local", cuda_graph_scope="full_iteration")
    assert eager.host_ms > 0 == whole.host_ms


def test_context_parallelism_by_heads_shows_less_than_by_gathering_and_more_so_on_more_ranks() -> None:
    ring, gathered, heads = (
        step(LLAMA, cp=4, micro_batch_size=1, cp_comm_type=kind).cp_ms
        for kind in ("p2p", "all_gather", "a2a")
    )
    assert gathered > heads > 0 and ring > 0
    # With more context ranks the traffic of heads per rank falls, and that of gathering stays.
    wide = step(LLAMA, cp=8, cp_comm_type="all_gather").cp_ms / step(LLAMA, cp=8, cp_comm_type="a2a").cp_ms
    assert wide > gathered / heads


def test_hybridep_spans_the_nvlink_domain_and_deepep_eight_ranks() -> None:
    whole_rack = load_cluster("gb200-nvl72")
    rack = replace(whole_rack, nodes=64 // whole_rack.gpus_per_node)
    flex: dict[str, Any] = {"ep": 64, "moe_token_dispatcher_type": "flex"}
    deepep, hybridep = (
        step(QWEN, rack, **flex, moe_flex_dispatcher_backend=backend).ep_ms
        for backend in ("deepep", "hybridep")
    )
    assert deepep > hybridep
    in_one_node = [
        step(QWEN, NODE, **(flex | {"ep": 8}), moe_flex_dispatcher_backend=backend).ep_ms
        for backend in ("deepep", "hybridep")
    ]
    assert in_one_node[0] == in_one_node[1]


def test_flex_needs_fewer_copies_of_the_dispatched_tokens() -> None:
    layout = Layout(ep=8)
    flex = replace(layout, moe_token_dispatcher_type="flex")
    columns = Columns.of(table_of(layout, flex, replace(flex, moe_flex_dispatcher_backend="hybridep")))
    share = RankShare(columns, QWEN, "transformer_engine", 1.0)
    alltoall, deepep, hybridep = experts_mlp(share).forward
    assert alltoall > deepep > hybridep


def test_nvlink_switches_reduce_only_from_hopper_on_and_cost_buffers() -> None:
    a100 = replace(load_cluster("dgx-a100-80"), nodes=1)
    for cluster, can_reduce in ((NODE, True), (a100, False)):
        nvls, no_nvls = (
            predicted(LLAMA, Layout(tp=4, nccl_nvls_enable=enabled), cluster) for enabled in (True, False)
        )
        assert (nvls["time"] < no_nvls["time"]) is can_reduce
        assert (nvls["beside"] > no_nvls["beside"]) is can_reduce


def test_registered_buffers_save_time_only_inside_the_nvlink_domain() -> None:
    assert step(LLAMA, NODE, nccl_ub=True).dp_ms < step(LLAMA, NODE).dp_ms
    assert step(LLAMA, nccl_ub=True).dp_ms == step(LLAMA).dp_ms  # H100 has four nodes.


def test_one_hardware_queue_hinders_streams_and_several_the_order_before_blackwell() -> None:
    one, several = (step(LLAMA, tp=4, cuda_device_max_connections=queues).tp_ms for queues in (1, 8))
    assert one == step(LLAMA, tp=4).tp_ms < several
    blackwell = replace(load_cluster("dgx-b200"), nodes=4)
    assert step(LLAMA, blackwell, tp=4, cuda_device_max_connections=8) == step(LLAMA, blackwell, tp=4)
    one, several = (step(QWEN, **ACROSS, cuda_device_max_connections=queues).ep_ms for queues in (1, 32))
    assert one > several


def test_expandable_segments_leave_more_memory_to_tensors() -> None:
    plain, expandable = (
        reserved_ratio(table_of(Layout(expandable_segments=enabled)), H100)[0] for enabled in (False, True)
    )
    assert 1 < expandable < plain


# --- pipelines that are written out


@given(st.sampled_from([(2, 1), (4, 1), (2, 2), (2, 4), (4, 2)]), st.booleans(), st.booleans())
def test_a_text_that_writes_the_even_split_out_is_predicted_like_the_even_split(
    split: tuple[int, int], moe: bool, recompute: bool
) -> None:
    (pp, vpp), model = split, latent() if moe else dense()
    chunks = [["t"] * (model.num_layers // (pp * vpp)) for _ in range(pp * vpp)]
    chunks[0] = ["E", *chunks[0]]
    chunks[-1] = [*chunks[-1], "L"]
    small = workload(model, global_batch_size=64)
    plain = Layout(pp=pp, vpp=vpp, **(FULL if recompute else {}))
    text = replace(plain, pipeline_model_parallel_layout=write(chunks))
    assert memory_breakdown(text, small, NODE) == memory_breakdown(plain, small, NODE)
    written_ms, plain_ms = (step_breakdown(layout, small, NODE).total_ms for layout in (text, plain))
    assert written_ms == pytest.approx(plain_ms, rel=0.02)


@st.composite
def _texts(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """Return pp, vpp, and the layers of each chunk, 8 in all."""
    pp, vpp = draw(st.sampled_from([(2, 1), (4, 1), (2, 2), (2, 3)]))
    cuts = sorted(draw(st.lists(st.integers(0, 8), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    return pp, vpp, tuple(np.diff([0, *cuts, 8]).tolist())


@given(_texts(), st.booleans())
def test_a_written_out_pipeline_holds_what_it_says(
    drawn: tuple[int, int, tuple[int, ...]], apart: bool
) -> None:
    pp, vpp, counts = drawn
    model = latent(mtp_num_layers=1)
    chunks = [["t"] * count for count in counts]
    chunks[0] = ["E", *chunks[0]]
    mtp = len(chunks) - (2 if apart and pp > 2 and not counts[-1] else 1)
    chunks[mtp] = [*chunks[mtp], "m"]
    chunks[-1] = [*chunks[-1], "L"]
    layout = Layout(pp=pp, vpp=vpp, pipeline_model_parallel_layout=write(chunks))
    small, columns = workload(model), Columns.single(layout)
    dp = data_parallel_size(8, columns["tp"], columns["pp"], columns["cp"])
    stages = stages_in_flight(columns, small, dp, all_stages=True)
    layers = np.array([np.sum(counts[rank::pp]) for rank in range(pp)])
    assert stages.layers.sum(axis=1).tolist() == layers.tolist()
    assert stages.layers[:, MOE].sum() == sum(model.moe_layer_pattern())
    assert stages.layers[:, DENSE].sum() == model.num_layers - sum(model.moe_layer_pattern())
    assert stages.predicts.tolist() == [rank == mtp % pp for rank in range(pp)]
    # The time predictor keeps one of several equal ranks.
    split = layers_by_rank(small, columns)
    kept_layers = np.sum(list(split.layers.values()), axis=0)[:, 0]
    with_mtp = layers + stages.predicts
    assert set(kept_layers.tolist()) - {0.0} == set(with_mtp.tolist()) - {0}
    assert split.heads.max() == 2 and split.embeddings.max() == 1


def test_a_last_stage_with_fewer_layers_makes_the_pipeline_faster() -> None:
    # The output layer of a small model costs as much as some of its layers.
    longer = replace(SMALL, seq_length=4096)
    even = step(longer, pp=4)
    lighter = step(longer, pp=4, pipeline_model_parallel_layout="Et*5|t*5|t*5|tL")
    assert lighter.total_ms < even.total_ms


def test_multi_token_prediction_apart_from_the_loss_has_an_embedding_of_its_own() -> None:
    small = workload(latent(mtp_num_layers=1))
    together = memory_breakdown(Layout(pp=4, pipeline_model_parallel_layout="Ettt|ttt|tt|mL"), small, NODE)
    apart = memory_breakdown(Layout(pp=4, pipeline_model_parallel_layout="Ettt|ttt|ttm|L"), small, NODE)
    table = small.model.padded_vocab_size(1) * small.model.hidden_size
    output = (table + small.model.hidden_size) * 2  # The final norm is as wide as the hidden state.
    assert apart[3].parameters_gib * GIB == pytest.approx(output)
    moved = [
        (after.parameters_gib - before.parameters_gib) * GIB
        for before, after in zip(together, apart, strict=True)
    ]
    assert moved[:2] == [0, 0] and moved[2] == pytest.approx(-moved[3]) and moved[2] > 2 * table
    # Two micro-batches wait on that stage for the loss of the first.
    assert apart[2].attention_gib == pytest.approx(2 * (2 + 1) * together[3].attention_gib, rel=0.2)
