"""Bytes of weights, gradients and optimizer state on the stages of many layouts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tuner.core import parameters
from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Floats, Ints
from tuner.core.layout import data_parallel_size, expert_data_parallel_size
from tuner.core.workload import Model, Precision, Workload
from tuner.predict import fsdp
from tuner.predict.memory.stages import MOE, StagesInFlight

QUANTISED_WEIGHT_BYTES: Mapping[Precision, float] = {
    "fp8": 2.0,
    "mxfp8": 2 * (1 + 1 / 32),
    "nvfp4": 2 * (0.5 + 1 / 16),
}
"""Bytes per weight of a linear layer's quantised copies for forward and backward, beside its bf16 weight. Published: 8
or 4 bits per element, and one byte of scale per block of 32 (mxfp8) or 16 (nvfp4) elements (Transformer Engine
2.11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """Bytes of the state of the model on a rank of each stage: arrays of shape [stages]."""

    parameters: Floats
    """Bytes of weights, including quantised copies."""
    gradients: Floats
    """Bytes of the buffers of gradients, which stay allocated between steps."""
    optimizer: Floats
    """Bytes of Adam's state."""
    whole: Floats
    """Bytes of the weights and gradients that Megatron-FSDP has temporarily unsplit."""
    reducing: Floats
    """Bytes of the copy of gradients that Gloo makes to reduce them; 0 on CUDA."""
    reducing_embedding: Floats
    """Bytes of the copy of the embedding's gradient if Gloo reduces it apart from the others; 0 on CUDA."""
    building: Floats
    """All bytes that are allocated while the model is built, including gradients."""


def model_state(
    c: Columns,
    workload: Workload,
    cluster: Cluster,
    stages: StagesInFlight,
    *,
    layers: Floats,
    vocabulary: Floats,
) -> ModelState:
    """Return the bytes of weights, gradients and optimizer state on a rank of each stage.

    The distributed optimizer splits Adam's state over the ranks with equal weights: dense weights over dp*cp, experts
    over edp. It copies the weights into one buffer per model chunk for dense weights and one for experts; both copies
    of a weight exist while the buffer is filled (distributed/param_and_grad_buffer.py). Megatron-FSDP splits gradients
    and weights too, by its strategy, and has some of them unsplit for a time. Gloo reduces a copy of a buffer of
    gradients.

    Args:
        c: The layouts.
        workload: The workload.
        cluster: The cluster.
        stages: The stages.
        layers: Number of layers of each stage, with those of multi-token prediction; shape [stages, (DENSE, MOE)].
        vocabulary: Rows of the embedding on a rank, one value per stage.
    """
    row = stages.row
    dense, experts = _weights(c, workload.model, stages, layers, vocabulary)
    dense_ranks = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"]) * c["cp"]
    expert_ranks = np.maximum(expert_data_parallel_size(cluster.world_size, c["pp"], c["ep"], c["etp"]), 1)
    of_dense, of_experts = (
        fsdp.Shares(*(ranks[row] for ranks in fsdp.shares(c, group))) for group in (dense_ranks, expert_ranks)
    )
    weights = _RankWeights(
        dense=dense,
        experts=experts,
        table=vocabulary * workload.model.hidden_size,
        held=dense / of_dense.weights + experts / of_experts.weights,
        gradients=dense / of_dense.gradients + experts / of_experts.gradients,
    )
    reducing, reducing_embedding = _reducing_bytes(c, workload, cluster, stages, weights)
    return ModelState(
        parameters=weights.held * workload.weight_bytes + _quantised_bytes(workload, stages, weights),
        gradients=weights.gradients * workload.gradient_bytes,
        optimizer=workload.adam_bytes * (dense / of_dense.optimizer + experts / of_experts.optimizer),
        whole=_whole_bytes(c, workload, stages, weights, layers=layers.sum(axis=1), ranks=dense_ranks),
        reducing=reducing,
        reducing_embedding=reducing_embedding,
        building=_building_bytes(c, workload, stages, weights),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankWeights:
    """Numbers of weights on a rank of each stage: arrays of shape [stages]."""

    dense: Floats
    """Number of weights outside routed experts, before Megatron-FSDP splits them."""
    experts: Floats
    """Number of weights of routed experts, before Megatron-FSDP splits them."""
    table: Floats
    """Number of weights of one embedding or output layer."""
    held: Floats
    """Number of weights on the rank after Megatron-FSDP splits them."""
    gradients: Floats
    """Number of gradients on the rank after Megatron-FSDP splits them."""

    @property
    def whole(self) -> Floats:
        """Return the number of all weights before Megatron-FSDP splits them."""
        return self.dense + self.experts


def _uses_distributed_optimizer(c: Columns) -> Bools:
    """Return a mask of the layouts with Megatron's distributed optimizer and without Megatron-FSDP; shape [rows]."""
    return c.on("use_distributed_optimizer") & ~c.on("use_megatron_fsdp")


def _building_bytes(c: Columns, workload: Workload, stages: StagesInFlight, weights: _RankWeights) -> Floats:
    """Return all bytes that are allocated at the peak while the model is built; shape [stages]."""
    row, weight_bytes = stages.row, float(workload.weight_bytes)
    # With ep 1 the experts share the buffer of the dense weights. With ep above 1 the experts have a buffer of their
    # own, which is filled after the buffer of the dense weights.
    experts_gradients = weights.experts * workload.gradient_bytes / weight_bytes
    apart = np.maximum(weights.dense - experts_gradients, weights.experts)
    moved = np.where((c["ep"] > 1)[row], apart, weights.whole) * weight_bytes / c["vpp"][row]
    building = weights.whole * weight_bytes + weights.gradients * workload.gradient_bytes
    building += np.where(_uses_distributed_optimizer(c)[row], moved, 0)
    if c.on("use_megatron_fsdp").any():
        # The unsplit weights are built before they are split.
        building += np.where(fsdp.gathers_weights(c)[row], weights.held * weight_bytes, 0)
    return building


def _whole_bytes(
    c: Columns,
    workload: Workload,
    stages: StagesInFlight,
    weights: _RankWeights,
    *,
    layers: Floats,
    ranks: Ints,
) -> Floats:
    """Return the bytes of weights and gradients that Megatron-FSDP has temporarily unsplit; 0 without it.

    `layers` is the number of layers of each stage, and `ranks` the number of ranks over which weights are split.
    """
    if not c.on("use_megatron_fsdp").any():
        return np.zeros_like(weights.dense)
    tables = np.where(stages.first | stages.last, weights.table, 0)
    return fsdp.whole_bytes(
        c,
        stages.row,
        workload,
        layers=layers,
        layer_weights=weights.whole - tables,
        table_weights=tables,
        ranks=ranks,
    )


def _reducing_bytes(
    c: Columns, workload: Workload, cluster: Cluster, stages: StagesInFlight, weights: _RankWeights
) -> tuple[Floats, Floats]:
    """Return the bytes of the largest copy of gradients that Gloo reduces, and of its copy of the embedding's gradient.

    The copies exist only on CPU with the distributed optimizer. The second is 0 unless the gradient of the embedding is
    reduced apart from others, during the backward pass of the first stage.
    """
    row, gradient_bytes = stages.row, float(workload.gradient_bytes)
    by_gloo = _uses_distributed_optimizer(c)[row] & np.bool_(cluster.device == "cpu")
    # With ep > 1 the gradients of experts have a buffer of their own, which is reduced later.
    larger_buffer = np.maximum(weights.dense, weights.experts)
    reduced = np.where((c["ep"] > 1)[row], larger_buffer, weights.whole) / c["vpp"][row]
    # If the reduction overlaps the backward pass, the first stage reduces pieces of whole weights.
    ranks = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"]) * c["cp"]
    piece = np.where(c.on("overlap_grad_reduce"), fsdp.bucket(ranks), np.inf)[row]
    piece = np.where(stages.first, piece, np.inf)
    piece = np.maximum(piece, np.where(stages.last, weights.table, 0))
    reduces_embedding = by_gloo & stages.first & np.isfinite(piece)
    return (
        np.where(by_gloo, np.minimum(reduced, piece) * gradient_bytes, 0),
        np.where(reduces_embedding, weights.table * gradient_bytes, 0),
    )


def _quantised_bytes(workload: Workload, stages: StagesInFlight, weights: _RankWeights) -> Floats:
    """Return the bytes of the quantised copies of linear weights, minus those of the bf16 weights that they replace."""
    replaced = float(workload.weight_bytes) if workload.fp8_param else 0.0
    copies = QUANTISED_WEIGHT_BYTES.get(workload.precision, 0.0)
    linear = weights.whole - weights.table * (stages.first + stages.last * 1.0)
    held_share = weights.held / np.maximum(weights.whole, 1)
    return np.maximum(linear, 0) * (copies - replaced) * held_share


def _weights(
    c: Columns, model: Model, stages: StagesInFlight, layers: Floats, vocabulary: Floats
) -> tuple[Floats, Floats]:
    """Return the number of weights outside routed experts, and of those in routed experts, on a rank of each stage.

    `layers` and `vocabulary` are those of `model_state`.
    """
    tp = c["tp"].astype(np.float64)

    def share(module: parameters.Parameters) -> Floats:
        return module.sharded / tp + module.replicated

    attention_and_norms = share(parameters.attention(model)) + parameters.layer_norms(model)
    layer = np.stack(
        [
            attention_and_norms + share(parameters.dense_mlp(model)),
            attention_and_norms + parameters.router(model) + share(parameters.shared_experts(model)),
        ],
        axis=1,
    )[stages.row]
    expert = parameters.expert(model)
    experts = (model.num_moe_experts or 0) / c["ep"] * (expert.sharded / c["etp"] + expert.replicated)
    table = vocabulary * model.hidden_size
    untied = not model.share_embeddings_and_output_weights
    # The last stage holds an output layer, or a copy of the embedding if they share weights. It also holds a copy of
    # the embedding if it looks up the tokens of multi-token prediction.
    is_whole_model = stages.first & stages.last
    copies = np.where(is_whole_model, 1 * untied, 1 * untied + (stages.predicts | (not untied)))
    mtp_layer = (3 * parameters.norm(model) + 2 * model.hidden_size**2 / tp)[stages.row]
    mtp = (model.mtp_num_layers or 0) * mtp_layer
    learned = model.position_embedding_type == "learned_absolute"
    positions = model.max_position_embeddings * model.hidden_size if learned else 0
    dense = (layer * layers).sum(axis=1)
    dense += np.where(stages.first, table + positions, 0)
    dense += np.where(stages.last, parameters.norm(model) + copies * table, 0)
    dense += np.where(stages.predicts, mtp + np.where(stages.last, 0, table), 0)
    return dense, layers[:, MOE] * experts[stages.row]
