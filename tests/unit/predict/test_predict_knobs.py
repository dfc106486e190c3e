"""Every knob has its effect in what is predicted, in the direction that its mechanism gives it."""

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.loader import load_cluster, load_model
from tests.unit.layouts import dense, latent, workload
from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import KNOBS, Layout, data_parallel_size
from tuner.core.pipeline_layout import write
from tuner.core.workload import Workload
from tuner.predict.memory.activations import Layers
from tuner.predict.memory.overhead import beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import GIB, StageMemory, peak_gib
from tuner.predict.memory.peak import breakdown as memory_of
from tuner.predict.memory.stages import DENSE, MOE, stages_in_flight
from tuner.predict.time.stages import layers_by_rank
from tuner.predict.time.step import StepTime, step_time_ms
from tuner.predict.time.step import step_breakdown as time_of

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
"""Of each knob a layout, another value (of it and what must move with it), and what of the prediction changes: step
time, allocated memory, and what is held beside it. A switch that moves work in time alone has no memory of its own;
variables of the environment are not seen by the allocator, but for its own; who flex dispatches with decides the time
only where NVLink spans nodes."""


def row(layout: Layout) -> pd.DataFrame:
    return pd.DataFrame([asdict(layout)])


def predicted(of: Workload, layout: Layout, on: Cluster = H100) -> dict[str, float]:
    table = row(layout)
    return {
        "time": float(step_time_ms(table, of, on)[0]),
        "memory": float(peak_gib(table, of, on)[0]),
        "beside": float(beyond_allocated_gib(table, of, on)[0]) + float(reserved_ratio(table, on)[0]),
    }


def test_every_knob_is_listed() -> None:
    assert set(EFFECTS) == set(KNOBS)


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_changes_what_is_predicted(knob: str) -> None:
    of, knobs, value, expected = EFFECTS[knob]
    layout = Layout(**knobs)
    changes = value if isinstance(value, dict) else {knob: value}
    before, after = predicted(of, layout), predicted(of, replace(layout, **changes))
    assert before == predicted(of, layout)
    changed = [name for name in before if after[name] != pytest.approx(before[name], rel=1e-6)]
    assert changed == expected.split()


def step(of: Workload, on: Cluster = H100, /, **knobs: Any) -> StepTime:
    return time_of(Layout(**knobs), of, on)


def stage(of: Workload, on: Cluster = H100, /, **knobs: Any) -> StageMemory:
    return memory_of(Layout(**knobs), of, on)[0]


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([LLAMA, QWEN, SHARED]))
def test_each_sharding_strategy_holds_no_more_of_the_model_and_moves_no_less(
    tp: int, size: int, of: Workload
) -> None:
    knobs: dict[str, Any] = {
        "tp": tp,
        "sp": tp > 1,
        "micro_batch_size": size,
        "use_megatron_fsdp": True,
        **OVERLAP,
    }
    held = [stage(of, **knobs, data_parallel_sharding_strategy=each) for each in STRATEGIES]
    for before, after in pairwise(held):
        assert after.parameters_gib <= before.parameters_gib
        assert after.gradients_gib <= before.gradients_gib
        assert after.optimizer_gib <= before.optimizer_gib
    plain = stage(of, tp=tp, sp=tp > 1, micro_batch_size=size)
    assert held[-1].parameters_gib <= plain.parameters_gib
    moved = [step(of, **knobs, data_parallel_sharding_strategy=each).dp_ms for each in STRATEGIES[1:]]
    assert moved == sorted(moved)


def test_fsdp_holds_its_shards_and_a_few_layers_whole() -> None:
    ranks, layers = H100.world_size, LLAMA.model.num_layers
    plain = stage(LLAMA)
    full = stage(LLAMA, **FSDP)
    assert full.parameters_gib == pytest.approx(plain.parameters_gib / ranks)
    assert full.gradients_gib == pytest.approx(plain.gradients_gib / ranks)
    assert full.optimizer_gib == pytest.approx(plain.optimizer_gib)
    # Two layers and 500 million weights ahead, and both of the vocabulary's tables one after the other.
    table = LLAMA.model.padded_vocab_size(1) * LLAMA.model.hidden_size
    layer = (plain.parameters_gib * GIB / 2 - table) / layers
    whole = 2 * (2 * layer + 500e6 + table) + 4 * (2 * layer + table)
    assert (full.buffers_gib - plain.buffers_gib) * GIB == pytest.approx(whole, rel=1e-6)
    registered = stage(LLAMA, **FSDP, nccl_ub=True)
    assert (full.buffers_gib - registered.buffers_gib) * GIB == pytest.approx(2 * 500e6)


def test_fsdp_gathers_the_weights_twice_a_micro_batch() -> None:
    few, many = (step(LLAMA, **FSDP, micro_batch_size=size).dp_ms for size in (4, 1))
    assert many / few == pytest.approx(4, rel=0.5)
    hidden = step(LLAMA, NODE, **FSDP, micro_batch_size=4)
    assert hidden.dp_ms < 0.2 * hidden.total_ms


@given(st.lists(st.integers(0, 31), min_size=2, max_size=4), st.sampled_from([1, 2]))
def test_offloading_more_layers_keeps_no_more_and_waits_no_less(counts: list[int], size: int) -> None:
    counts = sorted(counts)
    kept = [stage(LLAMA, cpu_offloading_num_layers=each, micro_batch_size=size) for each in counts]
    assert all(a.total_gib >= b.total_gib for a, b in pairwise(kept))
    waits = [step(LLAMA, cpu_offloading_num_layers=each, micro_batch_size=size) for each in counts]
    assert all(a.total_ms <= b.total_ms for a, b in pairwise(waits))


def test_offloaded_layers_leave_one_at_a_time_and_a_slow_link_shows() -> None:
    none, half = stage(LLAMA), stage(LLAMA, cpu_offloading_num_layers=16)
    of_layer = Layers(Columns.single(Layout()), LLAMA, "transformer_engine", 1.0)
    layer = float(of_layer.attention().kept[0] + of_layer.dense_mlp().kept[0])
    kept = [part.attention_gib + part.dense_mlp_gib for part in (none, half)]
    assert (kept[0] - kept[1]) * GIB == pytest.approx(15 * layer)
    assert step(LLAMA, cpu_offloading_num_layers=1).offload_ms == 0  # its transfer hides
    assert step(LLAMA, cpu_offloading_num_layers=31).offload_ms > 0


@given(
    st.sampled_from([LLAMA, SMALL, QWEN, SHARED]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(["none", "attn", "attn+mlp", "attn+moe_router+moe_preprocess"]),
    st.sampled_from(["transformer_engine", "local"]),
)
def test_graphs_never_launch_slower_and_never_hold_less(of: Workload, tp: int, scope: str, impl: str) -> None:
    eager: dict[str, Any] = {"tp": tp, "sp": tp > 1}
    graph: dict[str, Any] = {**eager, "cuda_graph_impl": impl, "cuda_graph_scope": scope}
    assert step(of, **graph).host_ms <= step(of, **eager).host_ms
    assert step(of, **graph).total_ms <= step(of, **eager).total_ms
    assert stage(of, **graph).total_gib >= stage(of, **eager).total_gib


def test_a_graph_of_the_whole_iteration_leaves_the_host_nothing() -> None:
    eager = step(SMALL, tp=8, sp=True)
    whole = step(SMALL, tp=8, sp=True, cuda_graph_impl="local", cuda_graph_scope="full_iteration")
    assert eager.host_ms > 0 == whole.host_ms


def test_a_ring_hides_what_the_other_ways_of_context_parallelism_show() -> None:
    ring, gathered, heads = (
        step(LLAMA, cp=4, micro_batch_size=1, cp_comm_type=kind).cp_ms
        for kind in ("p2p", "all_gather", "a2a")
    )
    assert gathered > heads > 0 and ring > 0
    # Half of the heads' traffic crosses once more with twice the context ranks; gathering grows with the sequence.
    wide = step(LLAMA, cp=8, cp_comm_type="all_gather").cp_ms / step(LLAMA, cp=8, cp_comm_type="a2a").cp_ms
    assert wide > gathered / heads


def test_hybridep_spans_the_nvlink_domain_and_deepep_eight_ranks() -> None:
    rack = load_cluster("gb200-nvl72")
    rack = replace(rack, nodes=64 // rack.gpus_per_node)
    flex: dict[str, Any] = {"ep": 64, "moe_token_dispatcher_type": "flex"}
    deepep, hybridep = (
        step(QWEN, rack, **flex, moe_flex_dispatcher_backend=each).ep_ms for each in ("deepep", "hybridep")
    )
    assert deepep > hybridep
    near = [
        step(QWEN, NODE, **(flex | {"ep": 8}), moe_flex_dispatcher_backend=each).ep_ms
        for each in ("deepep", "hybridep")
    ]
    assert near[0] == near[1]


def test_flex_needs_fewer_copies_of_the_dispatched_tokens() -> None:
    columns = Columns.of(
        pd.DataFrame(
            [
                asdict(Layout(ep=8)),
                asdict(Layout(ep=8, moe_token_dispatcher_type="flex")),
                asdict(
                    Layout(ep=8, moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
                ),
            ]
        )
    )
    alltoall, deepep, hybridep = Layers(columns, QWEN, "transformer_engine", 1.0).experts_mlp().forward
    assert alltoall > deepep > hybridep


def test_switches_reduce_only_from_hopper_on_and_cost_buffers() -> None:
    a100 = replace(load_cluster("dgx-a100-80"), nodes=1)
    for on, gains in ((NODE, True), (a100, False)):
        with_them, without = (
            predicted(LLAMA, Layout(tp=4, nccl_nvls_enable=each), on) for each in (True, False)
        )
        assert (with_them["time"] < without["time"]) is gains
        assert (with_them["beside"] > without["beside"]) is gains


def test_registered_buffers_gain_inside_the_nvlink_domain_alone() -> None:
    assert step(LLAMA, NODE, nccl_ub=True).dp_ms < step(LLAMA, NODE).dp_ms
    assert step(LLAMA, nccl_ub=True).dp_ms == step(LLAMA).dp_ms  # four nodes


def test_one_hardware_queue_hinders_streams_and_several_the_order_before_blackwell() -> None:
    one, several = (step(LLAMA, tp=4, cuda_device_max_connections=queues).tp_ms for queues in (1, 8))
    assert one == step(LLAMA, tp=4).tp_ms < several
    blackwell = replace(load_cluster("dgx-b200"), nodes=4)
    assert step(LLAMA, blackwell, tp=4, cuda_device_max_connections=8) == step(LLAMA, blackwell, tp=4)
    one, several = (step(QWEN, **ACROSS, cuda_device_max_connections=queues).ep_ms for queues in (1, 32))
    assert one > several


def test_expandable_segments_leave_more_of_the_memory() -> None:
    plain, expandable = (
        reserved_ratio(row(Layout(expandable_segments=each)), H100)[0] for each in (False, True)
    )
    assert 1 < expandable < plain


# --- pipelines that are written out


@given(st.sampled_from([(2, 1), (4, 1), (2, 2), (2, 4), (4, 2)]), st.booleans(), st.booleans())
def test_a_text_that_spells_the_even_split_is_predicted_alike(
    split: tuple[int, int], moe: bool, recompute: bool
) -> None:
    (pp, vpp), model = split, latent() if moe else dense()
    each = model.num_layers // (pp * vpp)
    chunks = [["t"] * each for _ in range(pp * vpp)]
    chunks[0] = ["E", *chunks[0]]
    chunks[-1] = [*chunks[-1], "L"]
    of = workload(model, global_batch_size=64)
    plain = Layout(pp=pp, vpp=vpp, **(FULL if recompute else {}))
    text = replace(plain, pipeline_model_parallel_layout=write(chunks))
    assert memory_of(text, of, NODE) == memory_of(plain, of, NODE)
    assert time_of(text, of, NODE).total_ms == pytest.approx(time_of(plain, of, NODE).total_ms, rel=0.02)


@st.composite
def _texts(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """pp, vpp, and the layers of each chunk, 8 in all."""
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
    of, columns = workload(model), Columns.single(layout)
    dp = data_parallel_size(8, columns["tp"], columns["pp"], columns["cp"])
    found = stages_in_flight(columns, of, dp, all_stages=True)
    ranks = np.array([np.sum(counts[rank::pp]) for rank in range(pp)])
    assert found.layers.sum(axis=1).tolist() == ranks.tolist()
    assert found.layers[:, MOE].sum() == sum(model.moe_layer_pattern())
    assert found.layers[:, DENSE].sum() == model.num_layers - sum(model.moe_layer_pattern())
    assert found.predicts.tolist() == [rank == mtp % pp for rank in range(pp)]
    # The time predictor keeps the ranks that differ: the fullest is the fullest there.
    split = layers_by_rank(of, columns)
    total = np.sum(list(split.layers.values()), axis=0)[:, 0]
    with_mtp = ranks + found.predicts
    assert set(total.tolist()) - {0.0} == set(with_mtp.tolist()) - {0}
    assert split.heads.max() == 2 and split.embeddings.max() == 1


def test_layers_taken_from_the_last_stage_make_the_pipeline_faster() -> None:
    # A small model's output layer costs as much as some of its layers.
    of = replace(SMALL, seq_length=4096)
    even = step(of, pp=4)
    lighter = step(of, pp=4, pipeline_model_parallel_layout="Et*5|t*5|t*5|tL")
    assert lighter.total_ms < even.total_ms


def test_multi_token_prediction_apart_from_the_loss_has_an_embedding_of_its_own() -> None:
    of = workload(latent(mtp_num_layers=1))
    together = memory_of(Layout(pp=4, pipeline_model_parallel_layout="Ettt|ttt|tt|mL"), of, NODE)
    apart = memory_of(Layout(pp=4, pipeline_model_parallel_layout="Ettt|ttt|ttm|L"), of, NODE)
    table = of.model.padded_vocab_size(1) * of.model.hidden_size
    output = (table + of.model.hidden_size) * 2  # and the final norm
    assert apart[3].parameters_gib * GIB == pytest.approx(output)
    moved = [
        (after.parameters_gib - before.parameters_gib) * GIB
        for before, after in zip(together, apart, strict=True)
    ]
    assert moved[:2] == [0, 0] and moved[2] == pytest.approx(-moved[3]) and moved[2] > 2 * table
    # Two micro-batches wait there for the loss of the first.
    assert apart[2].attention_gib == pytest.approx(2 * (2 + 1) * together[3].attention_gib, rel=0.2)
