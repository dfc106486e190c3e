"""Peak memory of every layout, from what Megatron allocates: weights, gradients, Adam, activations and transients.

The peak is what the allocator has handed out at the worst moment of the worst rank
(`torch.cuda.max_memory_allocated`, or the CPU program's account of tensors). What the allocator keeps
beyond it, CUDA's context and NCCL are in tuner/predict/memory/overhead.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core import parameters
from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import Layout, data_parallel_size, expert_data_parallel_size
from tuner.core.workload import Model, Precision, Workload
from tuner.predict import fsdp, graphs, offload
from tuner.predict.implementation import Implementation
from tuner.predict.memory.activations import Layers, Part
from tuner.predict.memory.stages import CHECKPOINTS, DENSE, MOE, StagesInFlight, stages_in_flight

Floats = NDArray[np.float64]
Moment = Literal["layer", "loss", "embedding", "optimizer", "build"]
MOMENTS: tuple[Moment, ...] = ("layer", "loss", "embedding", "optimizer", "build")
"""When a stage's peak can be: at the first backward pass's first layer (or in the forward pass before it), at its
loss, at the embedding's gradient, at the optimizer's step, or when the weights move into their buffer."""
BUILD = MOMENTS.index("build")

GIB = 1024**3
ROWS_AT_ONCE = 50_000
"""Bounds the memory of a prediction, and keeps its arrays in the cache."""

ADAM_BYTES: Mapping[bool, float] = {True: 8.0, False: 12.0}
"""Bytes a weight of Adam's state, by whether the weights are fp32: two fp32 moments, and an fp32 weight where not."""
QUANTISED_WEIGHT_BYTES: Mapping[Precision, float] = {
    **{"fp8": 2.0, "mxfp8": 2 * (1 + 1 / 32), "nvfp4": 2 * (0.5 + 1 / 16)},
}
"""Bytes a weight of a linear layer's quantised copies, for forward and backward, beside its bf16 one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """The peak of one pipeline stage's rank, by what holds it, in GiB; the parts sum to `total_gib`."""

    rank: int
    """Pipeline rank."""
    moment: Moment
    """When the peak is."""
    parameters_gib: float
    gradients_gib: float
    optimizer_gib: float
    buffers_gib: float
    """Held beside the model: workspaces, the gradient hooks' empty gradients, gather buffers, what FSDP has whole, and
    what CUDA graphs hold."""
    attention_gib: float
    """Kept for the backward pass by attention and the norm in front, over all micro-batches in flight."""
    dense_mlp_gib: float
    experts_gib: float
    """Kept by router, dispatch, routed and shared experts, and the norm in front."""
    checkpoints_gib: float
    """Inputs of recomputed layers."""
    loss_gib: float
    """Final norm, logits and what the loss keeps of them."""
    transient_gib: float
    """What the worst moment needs beyond all that is kept."""

    @property
    def total_gib(self) -> float:
        """The peak, in GiB."""
        return float(sum(getattr(self, part) for part in PARTS))


PARTS: tuple[str, ...] = tuple(
    f.name for f in fields(StageMemory) if f.name.endswith("_gib") and f.name != "total_gib"
)


def peak_gib(
    table: pd.DataFrame,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    imbalance: float | None = None,
) -> Floats:
    """Return the peak of each row's worst rank in GiB, one value a row of a table of valid layouts.

    `imbalance` is the load of the busiest rank's experts over the mean: 1 where routing is balanced; without it, what
    is to be expected of the workload's router (tuner/predict/routing.py).
    """
    peaks = np.empty(len(table))
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        columns = Columns.of(table.iloc[rows])
        stages, parts, _ = _parts(columns, workload, cluster, implementation, imbalance, every=False)
        total = sum(parts[name] for name in PARTS)
        firsts = np.flatnonzero(np.diff(stages.row, prepend=-1))
        peaks[rows] = np.maximum.reduceat(total, firsts) / GIB
    return peaks


def breakdown(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    imbalance: float | None = None,
) -> tuple[StageMemory, ...]:
    """Return what holds the peak of each pipeline stage of one layout; the largest total is its `peak_gib`."""
    columns = Columns.single(layout)
    stages, parts, moments = _parts(columns, workload, cluster, implementation, imbalance, every=True)
    return tuple(
        StageMemory(
            rank=int(stages.rank[stage]),
            moment=MOMENTS[moments[stage]],
            **{name: float(parts[name][stage]) / GIB for name in PARTS},
        )
        for stage in range(len(stages.row))
    )


def _parts(
    columns: Columns,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation,
    imbalance: float | None,
    every: bool,
) -> tuple[StagesInFlight, dict[str, Floats], NDArray[np.intp]]:
    """Return the stages, the bytes of every part of StageMemory, one value a stage, and the moment's index."""
    dp = data_parallel_size(cluster.world_size, columns["tp"], columns["pp"], columns["cp"])
    stages = offload.keep_on_device(stages_in_flight(columns, workload, dp, all_stages=every), columns, workload.model)
    layers = Layers(columns, workload, implementation, imbalance)
    vocabulary = _vocabulary(workload.model, columns)
    held = stages.layers + _mtp_layers(workload.model, stages)
    parts = _state(columns, workload, cluster, stages, held, vocabulary[stages.row])
    parts["buffers_gib"] = layers.buffers(
        held[:, DENSE], held[:, MOE], stages.last, vocabulary[stages.row], stages.row
    ) + parts.pop("whole")
    updated = parts["optimizer_gib"] / ADAM_BYTES[workload.precision == "fp32"]
    adam, reducing = layers.optimizer_step(vocabulary[stages.row], updated), parts.pop("reducing")
    output = np.where(stages.last, vocabulary[stages.row] * workload.model.hidden_size, 0) * (
        4.0 if workload.grad_reduce_in_fp32 else layers.size
    )
    behind = np.maximum(reducing - output, 0) / np.maximum(parts["gradients_gib"] - output, 1)
    activations, moment = _activations(
        layers,
        stages,
        vocabulary,
        _mtp_layers(workload.model, stages),
        adam,
        reducing,
        parts.pop("reducing_embedding"),
        1 - np.minimum(behind, 1),
    )
    parts |= activations
    if graphs.captures(columns).any():
        in_flight = stages.in_flight[:, DENSE] + stages.in_flight[:, MOE]
        kept = np.sum(list(activations.values()), axis=0)
        static = graphs.static_bytes(columns, stages.row, in_flight, layers.state, kept)
        parts["buffers_gib"] = parts["buffers_gib"] + static
    building = parts.pop("building")
    builds = building > sum(parts[name] for name in PARTS)
    for name in PARTS:
        if name not in {"parameters_gib", "gradients_gib"}:
            parts[name] = np.where(builds, 0, parts[name])
    parts["transient_gib"] += np.where(builds, building - parts["parameters_gib"] - parts["gradients_gib"], 0)
    return stages, parts, np.where(builds, BUILD, moment)


def _mtp_layers(model: Model, stages: StagesInFlight) -> Floats:
    """Multi-token-prediction layers of each stage, dense and with experts: all are on one, of the model's last kind."""
    count = np.where(stages.predicts, model.mtp_num_layers or 0, 0).astype(np.float64)
    moe = model.moe_layer_pattern()[-1]
    return np.stack([count * (not moe), count * moe], axis=1)


def _vocabulary(model: Model, columns: Columns) -> Floats:
    """Rows of embedding and output layer on a rank, Megatron's padding included."""
    sizes, index = np.unique(columns["tp"], return_inverse=True)
    return np.array([model.padded_vocab_size(int(tp)) / tp for tp in sizes])[index]


def _state(
    c: Columns, workload: Workload, cluster: Cluster, stages: StagesInFlight, held: Floats, vocabulary: Floats
) -> dict[str, Floats]:
    """Bytes of weights, gradients and optimizer of each stage's rank.

    Gradients are fp32, or like the weights. Adam holds two fp32 moments, and an fp32 weight where the model's is
    not; the distributed optimizer splits them over the ranks with the same weights: dense over dp*cp, experts over
    edp. It also has the weights in one buffer a chunk and kind, which is made while they are still outside: `building`
    (distributed/param_and_grad_buffer.py). FSDP splits gradients and weights as well, by its strategy, and has some
    `whole` for a while. Gloo reduces a copy of a buffer of gradients: `reducing`.
    """
    dense, experts = _weights(c, workload.model, stages, held, vocabulary)
    in_fp32 = workload.precision == "fp32"
    weight, adam = (4.0 if in_fp32 else 2.0), ADAM_BYTES[in_fp32]
    gradient = 4.0 if workload.grad_reduce_in_fp32 else weight
    alone = weight if workload.fp8_param else 0.0
    quantised = QUANTISED_WEIGHT_BYTES.get(workload.precision, 0.0)
    linear = dense + experts - vocabulary * workload.model.hidden_size * (stages.first + stages.last * 1.0)
    world = cluster.world_size
    distributed = c.on("use_distributed_optimizer") & ~c.on("use_megatron_fsdp")
    dense_ranks = data_parallel_size(world, c["tp"], c["pp"], c["cp"]) * c["cp"]
    expert_ranks = np.maximum(expert_data_parallel_size(world, c["pp"], c["ep"], c["etp"]), 1)
    of_dense, of_experts = (
        fsdp.Shares(*(ranks[stages.row] for ranks in fsdp.shares(c, each)))
        for each in (dense_ranks, expert_ranks)
    )
    # With ep 1 the experts share the dense weights' buffer; else theirs comes later, as do their gradients.
    apart = np.maximum(dense - experts * gradient / weight, experts)
    moved = np.where((c["ep"] > 1)[stages.row], apart, dense + experts) * weight / c["vpp"][stages.row]
    reduced = np.where((c["ep"] > 1)[stages.row], np.maximum(dense, experts), dense + experts)
    # Overlapped, it goes in pieces of whole weights, on the first stage.
    piece = np.where(c.on("overlap_grad_reduce"), fsdp.bucket(dense_ranks), np.inf)[stages.row]
    piece = np.where(stages.first, piece, np.inf)
    table = vocabulary * workload.model.hidden_size
    piece = np.maximum(piece, np.where(stages.last, table, 0))
    by_gloo = distributed[stages.row] & np.bool_(cluster.device == "cpu")
    weights = dense / of_dense.weights + experts / of_experts.weights
    gradients = dense / of_dense.gradients + experts / of_experts.gradients
    quantised_linear = np.maximum(linear, 0) * (quantised - alone) * weights / np.maximum(dense + experts, 1)
    building = (dense + experts) * weight + gradients * gradient
    building += np.where(distributed[stages.row], moved, 0)
    whole = np.zeros_like(dense)
    if c.on("use_megatron_fsdp").any():
        # Built whole, then split.
        building += np.where(fsdp.gathers_weights(c)[stages.row], weights * weight, 0)
        tables = np.where(stages.first | stages.last, table, 0)
        whole = fsdp.whole_bytes(
            c, stages.row, held.sum(axis=1), dense + experts - tables, tables, weight, gradient, dense_ranks
        )
    return {
        "whole": whole,
        "reducing": np.where(by_gloo, np.minimum(reduced / c["vpp"][stages.row], piece) * gradient, 0),
        "reducing_embedding": np.where(by_gloo & stages.first & np.isfinite(piece), table * gradient, 0),
        "building": building,
        "parameters_gib": weights * weight + quantised_linear,
        "gradients_gib": gradients * gradient,
        "optimizer_gib": adam * (dense / of_dense.optimizer + experts / of_experts.optimizer),
    }


def _weights(
    c: Columns, model: Model, stages: StagesInFlight, held: Floats, vocabulary: Floats
) -> tuple[Floats, Floats]:
    """Weights of each stage's rank: those that data parallel ranks share, and the routed experts'."""
    tp = c["tp"].astype(np.float64)

    def share(module: parameters.Parameters) -> Floats:
        return module.sharded / tp + module.replicated

    around = share(parameters.attention(model)) + parameters.layer_norms(model)
    layer = np.stack(
        [
            around + share(parameters.dense_mlp(model)),
            around + parameters.router(model) + share(parameters.shared_experts(model)),
        ],
        axis=1,
    )[stages.row]
    one = parameters.expert(model)
    local = (model.num_moe_experts or 0) / c["ep"] * (one.sharded / c["etp"] + one.replicated)
    tables = vocabulary * model.hidden_size
    untied = not model.share_embeddings_and_output_weights
    whole = stages.first & stages.last
    # The last stage has a copy of the embedding where it shares it, as has that which looks up the tokens of MTP.
    copies = np.where(whole, 1 * untied, 1 * untied + (stages.predicts | (not untied)))
    mtp = (model.mtp_num_layers or 0) * (3 * parameters.norm(model) + 2 * model.hidden_size**2 / tp)[
        stages.row
    ]
    learned = model.position_embedding_type == "learned_absolute"
    positions = model.max_position_embeddings * model.hidden_size if learned else 0
    dense = (layer * held).sum(axis=1)
    dense += np.where(stages.first, tables + positions, 0)
    dense += np.where(stages.last, parameters.norm(model) + copies * tables, 0)
    dense += np.where(stages.predicts, mtp + np.where(stages.last, 0, tables), 0)
    return dense, held[:, MOE] * local[stages.row]


def _activations(
    layers: Layers,
    stages: StagesInFlight,
    vocabulary: Floats,
    mtp: Floats,
    adam: Floats,
    reducing: Floats,
    reducing_embedding: Floats,
    left: Floats,
) -> tuple[dict[str, Floats], NDArray[np.intp]]:
    """Return the bytes kept at each stage's worst moment, by module, and the transient; and the moment's index.

    `mtp` is the layers of multi-token prediction by kind; `adam` and `reducing` are the bytes that the optimizer's step
    and the reduction of the gradients need for a moment, `reducing_embedding` that of the embedding's, which comes
    beside its gradient where it overlaps; `left` is the share of a micro-batch's activations that is
    still kept when the first piece of the gradients is reduced.
    """
    row, last = stages.row, stages.last
    attention, dense = layers.attention(), layers.dense_mlp()
    experts = layers.experts_mlp() if layers.model.is_moe else dense
    head = layers.head(vocabulary)
    state = layers.state[row]
    sizes = np.stack([attention.kept + dense.kept, attention.kept + experts.kept, layers.state], axis=1)[row]
    predicting = _predicting(layers, stages, mtp)
    in_flight, at_loss = stages.in_flight + predicting, stages.at_loss + predicting
    # Multi-token prediction goes backward before the final norm, and its layers after the main loss.
    predicted = predicting.sum(axis=1) * layers.mtp_extra()[row]
    predicted += np.where(last & (mtp.sum(axis=1) > 0), head.norm[row], 0)
    loss = np.where(last, head.kept[row] + mtp.sum(axis=1) * layers.mtp_extra()[row], 0)
    embedding = np.where(stages.first, vocabulary[row] * layers.model.hidden_size * layers.size, 0)
    full = (in_flight * sizes).sum(axis=1)
    transients = np.stack(
        [
            _layer_transient(layers, attention, dense, experts, stages, in_flight, sizes),
            np.where(last, head.backward[row], 0),
            np.where(stages.first, embedding + state + reducing_embedding, 0),
            np.maximum(adam, reducing),
        ]
    )
    transients[0] += predicted
    transients[:2] += layers.pipeline_tensors(row, stages.rank > 0, stages.forwards_left)
    first_chunk = (stages.first_chunk * sizes).sum(axis=1)
    # Overlapped, a piece is reduced while the last micro-batch goes backward: the others are done, and its layers,
    # but for one of those that are recomputed together.
    one = np.minimum(first_chunk * layers.columns["vpp"][row], full)
    working = stages.working.sum(axis=1)
    again = (stages.working * sizes[:, :2]).sum(axis=1) / np.maximum(working, 1)
    overlapped = np.where(
        layers.columns.on("overlap_grad_reduce")[row], reducing + state + again - full + one * left, 0
    )
    transients[0] = np.maximum(transients[0], overlapped)
    early = full - first_chunk
    kept = np.stack([full, (at_loss * sizes).sum(axis=1) + loss, early, np.zeros_like(full)])
    moment = np.argmax(kept + transients, axis=0)
    counts = np.where((moment == 1)[:, None], at_loss, in_flight)
    counts = counts - np.where(moment == 2, 1, 0)[:, None] * stages.first_chunk
    counts = np.where(moment == 3, 0, 1)[:, None] * counts
    return {
        "attention_gib": (counts[:, DENSE] + counts[:, MOE]) * attention.kept[row],
        "dense_mlp_gib": counts[:, DENSE] * dense.kept[row],
        "experts_gib": counts[:, MOE] * experts.kept[row],
        "checkpoints_gib": counts[:, CHECKPOINTS] * state,
        "loss_gib": np.where(moment == 1, loss, 0),
        "transient_gib": np.take_along_axis(transients, moment[None], axis=0)[0],
    }, moment


def _predicting(layers: Layers, stages: StagesInFlight, mtp: Floats) -> Floats:
    """What `mtp` layers of multi-token prediction keep, of every micro-batch that waits for its loss: as in_flight."""
    kept = mtp * np.where(stages.last, 1, stages.last_chunk_in_flight)[:, None]
    # It recomputes each of its layers, but knows no block method.
    checkpointed = layers.columns.among("recompute_method", "uniform")[stages.row]
    return np.column_stack([np.where(checkpointed[:, None], 0, kept), checkpointed * kept.sum(axis=1)])


def _layer_transient(
    layers: Layers,
    attention: Part,
    dense: Part,
    experts: Part,
    stages: StagesInFlight,
    in_flight: Floats,
    sizes: Floats,
) -> Floats:
    """What the worst layer needs beyond all that is kept: its forward pass when all is in flight, or its backward.

    Backward goes from the last layer up, and frees as it goes: a layer of the other kind has the kept of a layer
    less. Full recompute first brings back what the layers kept.
    """
    row = stages.row
    works = stages.working.sum(axis=1) > 0
    # A forward pass goes beside the gradient that came last from the next stage, and the input that came last from
    # the previous one: the schedule's variables hold them. Recomputed, it goes beside the gradient it waits for.
    held = np.where(works | ~stages.last, 1, 0) + (stages.rank > 0) * ~works
    waits = np.where(works | (stages.pp > 1), held, 0) * sizes[:, CHECKPOINTS]
    # The first forward that a backward goes beside is the one after all that are in flight.
    beside = layers.overlaps_experts[row] & (stages.forwards_left > 0)
    extra = np.stack([_extra(attention, mlp, row, waits, beside) for mlp in (dense, experts)], axis=1)
    kind = stages.last_is_moe.astype(np.int64)[:, None]
    ours = np.take_along_axis(extra, kind, axis=1)[:, 0]
    others = np.take_along_axis(extra, 1 - kind, axis=1)[:, 0]
    freed = np.take_along_axis(sizes, kind, axis=1)[:, 0]
    mixed = (stages.layers.min(axis=1) > 0) & ~works
    worst = np.where(mixed, np.maximum(ours, others - freed), ours)
    again = (stages.working * sizes[:, :2]).sum(axis=1)
    # Block recompute leaves layers alone: they go first, and recomputing as much later needs its output as well.
    again += np.where(~works & (in_flight[:, CHECKPOINTS] > 0), sizes[:, CHECKPOINTS], 0)
    return np.where(in_flight.sum(axis=1) > 0, worst + again, 0)


def _extra(
    attention: Part, mlp: Part, row: NDArray[np.int64], waits: Floats, beside: NDArray[np.bool_]
) -> Floats:
    """What one layer needs beyond what it keeps, at the worst moment of its forward and backward pass.

    A layer of the next micro-batch that goes forward `beside` has its attention done when this one's MLP goes backward,
    and is whole when this one's attention does (megatron/core/models/common/model_chunk_schedule_plan.py, run).
    """
    in_mlp = mlp.dropped[row] + np.maximum(mlp.forward[row] + waits, mlp.backward[row])
    in_mlp += np.where(beside, attention.kept[row], 0)
    in_attention = (attention.dropped + attention.backward - mlp.kept)[row]
    in_attention += np.where(beside, (attention.kept + mlp.kept)[row], 0)
    worst: Floats = np.maximum(in_mlp, in_attention)
    return worst
