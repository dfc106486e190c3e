"""Predicted peak memory equals 18 measured runs on B200, arithmetic by hand, and itself for many rows at once."""

from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.memory import B200, b200_stages, worst_errors
from tests.unit.layouts import cluster, dense, latent, mixture, workload
from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Floats
from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Workload
from tuner.predict.implementation import Implementation
from tuner.predict.memory.mlp import experts_mlp
from tuner.predict.memory.peak import GIB, MEMORY_PARTS, StageMemory, memory_breakdown, peak_gib
from tuner.predict.memory.share import RankShare
from tuner.predict.memory.stages import stages_in_flight
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts

MODELS = {"dense": dense(), "mixture": mixture(), "latent": latent(mtp_num_layers=1)}
FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}

SIZES = (1, 2, 4)


def peaks_of(
    layouts: list[Layout], of: Workload, on: Cluster, implementation: Implementation = "transformer_engine"
) -> Floats:
    """Return the predicted peak of each layout in GiB."""
    return peak_gib(pd.DataFrame(map(asdict, layouts)), of, on, implementation)


def one_stage(layout: Layout, of: Workload, gpus: int = 1) -> StageMemory:
    (stage,) = memory_breakdown(layout, of, cluster(gpus))
    return stage


@pytest.mark.skipif(not B200.exists(), reason="the measured runs of ../shared/data are not here")
def test_peaks_on_b200_are_within_one_percent_on_average_and_three_at_worst() -> None:
    stages = list(b200_stages())
    errors = np.abs(list(worst_errors(stages).values()))
    assert len(errors) == 18
    assert errors.mean() <= 0.01
    assert errors.max() <= 0.03
    assert max(abs(stage.error) for stage in stages) <= 0.03


def test_the_state_of_the_model_equals_a_count_by_hand() -> None:
    # A layer: 64*(64 + 2*32) + 64*64 in attention, 3*64*96 in the MLP, 2*64 in norms; the vocabulary pads to 1024.
    weights = 8 * (64 * 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 2 * 1024 * 64
    stage = one_stage(Layout(), workload(dense()), gpus=4)
    assert stage.parameters_gib * GIB == pytest.approx(2 * weights)
    assert stage.gradients_gib * GIB == pytest.approx(4 * weights)
    assert stage.optimizer_gib * GIB == pytest.approx(12 * weights / 4)
    fp32 = one_stage(Layout(use_distributed_optimizer=False), workload(dense(), precision="fp32"), gpus=4)
    assert fp32.parameters_gib * GIB == pytest.approx(4 * weights)
    assert fp32.optimizer_gib * GIB == pytest.approx(8 * weights)


def test_weights_exist_twice_while_their_buffer_is_filled() -> None:
    wide = dense(hidden_size=8192, ffn_hidden_size=32768, kv_channels=1024, vocab_size=1024)
    stage = one_stage(Layout(**FULL), workload(wide, global_batch_size=128), gpus=128)
    assert stage.moment == "build"
    assert stage.total_gib == pytest.approx(2 * stage.parameters_gib + stage.gradients_gib)
    alone = one_stage(
        Layout(**FULL, use_distributed_optimizer=False), workload(wide, global_batch_size=128), gpus=128
    )
    assert alone.moment != "build"


def test_experts_are_split_over_expert_data_parallel_ranks() -> None:
    experts, others = 8 * 8 * 3 * 64 * 48, 8 * (64 * 128 + 64 * 64 + 3 * 64 * 48 + 8 * 64 + 2 * 64)
    others += 64 + 2 * 1024 * 64
    stage = one_stage(Layout(ep=4), workload(mixture()), gpus=8)
    assert stage.gradients_gib * GIB == pytest.approx(4 * (others + experts / 4))
    assert stage.optimizer_gib * GIB == pytest.approx(12 * (others / 8 + experts / 4 / 2))


def test_a_dense_layer_keeps_the_tensors_of_a_list_by_hand() -> None:
    tokens, hidden, heads, groups, ffn = 64, 64, 64, 32, 96
    layer = hidden + hidden + (heads + 2 * groups) + heads  # input, norm, query, key, value, context
    layer += hidden + hidden + 2 * ffn + ffn  # sum, norm, both halves of fc1, fc2's input
    stage = one_stage(Layout(), workload(dense()))
    kept = stage.attention_gib + stage.dense_mlp_gib
    log_sums = tokens * 8 * 4  # fp32, one per token and head
    assert kept * GIB == pytest.approx(8 * (tokens * layer * 2 + log_sums))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_larger_micro_batch_never_needs_less(model: str) -> None:
    layouts = [
        Layout(tp=tp, pp=pp, sp=sp, micro_batch_size=size, **recompute)
        for tp, pp, sp, recompute in product(SIZES, SIZES, (False, True), ({}, FULL))
        for size in SIZES
    ]
    # The batch has at least as many micro-batches as there are stages, whatever their size.
    of = workload(MODELS[model], global_batch_size=512)
    peaks = peaks_of(layouts, of, cluster(16)).reshape(-1, len(SIZES))
    assert (np.diff(peaks) >= 0).all()


@pytest.mark.parametrize("implementation", ["transformer_engine", "torch_cuda", "torch"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_recomputing_layers_never_needs_more(model: str, implementation: Implementation) -> None:
    # With two layers per chunk, block recompute of one layer is in between.
    block = {**FULL, "recompute_method": "block"}
    layouts = [
        Layout(tp=tp, pp=pp, micro_batch_size=size, **recompute)
        for tp, size, pp in product(SIZES, SIZES, (1, 4))
        for recompute in (FULL, block, {})
    ]
    of = workload(replace(MODELS[model], mtp_num_layers=None))
    peaks = peaks_of(layouts, of, cluster(16), implementation).reshape(-1, 3)
    assert (np.diff(peaks) >= 0).all()


@pytest.mark.parametrize(
    "modules", ["layernorm", "mla_up_proj", "moe", "moe_act", "shared_experts", "mlp", "none"]
)
def test_selective_recompute_never_keeps_more(modules: str) -> None:
    of, on = workload(MODELS["latent"], precision="bf16"), cluster(8)
    plain = Layout(pp=4, ep=2)
    selective = replace(plain, recompute_granularity="selective", recompute_modules=modules)
    for before, after in zip(
        memory_breakdown(plain, of, on), memory_breakdown(selective, of, on), strict=True
    ):
        kept = ("attention_gib", "dense_mlp_gib", "experts_gib")
        assert sum(getattr(after, part) for part in kept) <= sum(getattr(before, part) for part in kept)
        assert after.total_gib <= before.total_gib


@pytest.mark.parametrize("implementation", ["transformer_engine", "torch_cuda", "torch"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_row_is_the_largest_stage_of_its_breakdown(model: str, implementation: Implementation) -> None:
    of, on = workload(MODELS[model]), cluster(16)
    table = enumerate_layouts(of, on, default_domain(of, on)).table.sample(60, random_state=7)
    peaks = peak_gib(table, of, on, implementation, imbalance=1.25)
    for row, row_peak in zip(table.to_dict("records"), peaks, strict=True):
        layout = Layout(**{str(name): value for name, value in row.items()})
        stages = memory_breakdown(layout, of, on, implementation, imbalance=1.25)
        assert row_peak == pytest.approx(max(stage.total_gib for stage in stages), rel=1e-12)
        assert [stage.rank for stage in stages] == list(range(layout.pp))
        assert all(getattr(stage, part) >= 0 for stage in stages for part in MEMORY_PARTS)


def forwards_before_first_backward(rank: int, pp: int, vpp: int, group: int, micro: int) -> list[int]:
    """Return the chunk of every forward pass before the first backward pass, in the order of Megatron's schedule."""
    table = [
        chunk
        for start in range(0, micro, group)
        for chunk in range(vpp)
        for _ in range(start, min(start + group, micro))
    ]
    warmup = pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * group
    return table[: warmup + 1]


@settings(max_examples=60)
@given(st.sampled_from([(2, 1), (4, 1), (2, 2), (2, 4), (4, 2)]), st.integers(1, 2), st.integers(1, 3))
def test_layers_in_flight_are_those_of_the_schedule(split: tuple[int, int], groups: int, rounds: int) -> None:
    (pp, vpp), group = split, groups * split[0]
    micro, model = group * rounds, latent()
    layout = Layout(pp=pp, vpp=vpp, microbatch_group_size_per_vp_stage=group)
    of = workload(model, global_batch_size=micro)
    columns = Columns.single(layout)
    dp = data_parallel_size(pp, columns["tp"], columns["pp"], columns["cp"])
    chunk_layers = model.num_layers // (pp * vpp)
    in_flight = stages_in_flight(columns, of, dp, all_stages=True).in_flight
    for rank in range(pp):
        chunks = forwards_before_first_backward(rank, pp, vpp, group, micro)
        starts = [(chunk * pp + rank) * chunk_layers for chunk in chunks]
        moe = sum(
            model.moe_layer_pattern()[layer]
            for start in starts
            for layer in range(start, start + chunk_layers)
        )
        assert in_flight[rank].tolist() == [len(chunks) * chunk_layers - moe, moe, 0]


def test_the_first_stage_holds_most_micro_batches_and_the_last_the_loss() -> None:
    stages = memory_breakdown(Layout(pp=4), workload(dense()), cluster(4))
    kept = [stage.attention_gib / stages[-1].attention_gib for stage in stages]
    assert kept == pytest.approx([4, 3, 2, 1])
    assert [stage.loss_gib > 0 for stage in stages] == [False, False, False, True]


def test_an_uneven_load_of_experts_needs_more_only_where_there_are_experts() -> None:
    for model, needs_more in ((dense(), False), (mixture(), True)):
        even, uneven = (
            memory_breakdown(Layout(), workload(model), cluster(1), imbalance=load)[0] for load in (1.0, 2.0)
        )
        assert (uneven.experts_gib > even.experts_gib) is needs_more
        assert uneven.attention_gib == even.attention_gib


def test_a_larger_vocabulary_costs_twice_on_one_stage_unless_it_is_shared() -> None:
    shared = dense(share_embeddings_and_output_weights=True)
    table = 1024 * 64 * 4
    untied_gib, tied_gib = (one_stage(Layout(), workload(model)).gradients_gib for model in (dense(), shared))
    assert (untied_gib - tied_gib) * GIB == pytest.approx(table)
    untied, tied = (
        memory_breakdown(Layout(pp=2), workload(model), cluster(2)) for model in (dense(), shared)
    )
    assert untied[1].gradients_gib == tied[1].gradients_gib  # the last stage holds a copy


def test_quantised_precisions_keep_smaller_inputs_and_more_weights() -> None:
    bf16, fp8 = (one_stage(Layout(), workload(dense(), precision=p)) for p in ("bf16", "fp8"))
    assert fp8.dense_mlp_gib < bf16.dense_mlp_gib
    assert fp8.parameters_gib > bf16.parameters_gib


def test_the_all_gather_dispatcher_holds_the_tokens_of_the_whole_expert_grid() -> None:
    layouts = [Layout(ep=ep, moe_token_dispatcher_type="allgather") for ep in (1, 2, 4)]
    columns = Columns.of(pd.DataFrame(map(asdict, layouts)))
    share = RankShare(columns, workload(mixture()), "transformer_engine", 1.0)
    forward, state = experts_mlp(share).forward, share.state[0]
    # All tokens in bf16, all tokens and the sum of this rank's in fp32, and the output of the shared experts. A grid of
    # one rank sums nothing up.
    assert forward[1:] == pytest.approx([state * (2 + 2 * 3 + 1), state * (4 + 2 * 5 + 1)])


def test_overlapped_experts_hold_one_more_layer_and_not_one_more_micro_batch() -> None:
    work = workload(mixture(num_layers=16), seq_length=4096, global_batch_size=32)
    plain, overlapped = (
        memory_breakdown(Layout(ep=2, overlap_moe_expert_parallel_comm=on), work, cluster(2))[0]
        for on in (False, True)
    )
    micro_batch = plain.attention_gib + plain.experts_gib
    # The nodes of each layer hold three states, and one layer goes forward beside another that goes backward.
    assert micro_batch < overlapped.attention_gib + overlapped.experts_gib < 1.25 * micro_batch
    assert micro_batch / 32 < overlapped.total_gib - plain.total_gib < micro_batch / 2
