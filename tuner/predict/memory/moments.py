"""The moments at which a stage's memory may peak, and the bytes of activations at the peak."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Bools, Floats, Ints
from tuner.predict.memory.attention import attention
from tuner.predict.memory.buffers import adam_step, pipeline_tensors
from tuner.predict.memory.head import head, mtp_extra
from tuner.predict.memory.mlp import dense_mlp, experts_mlp
from tuner.predict.memory.share import HalfLayer, RankShare
from tuner.predict.memory.stages import CHECKPOINTS, DENSE, MOE, StagesInFlight
from tuner.predict.memory.state import ModelState

Moment = Literal["layer", "loss", "embedding", "optimizer", "build"]
MOMENTS: tuple[Moment, ...] = ("layer", "loss", "embedding", "optimizer", "build")
"""Moments at which a stage's memory may peak: while the first layer in the first backward pass runs, or the forward
pass before it ("layer"); while the loss is computed ("loss"); while the gradient of the embedding is computed
("embedding"); in the step of the optimizer ("optimizer"); while the model is built ("build")."""
LAYER, LOSS, EMBEDDING, OPTIMIZER, BUILD = range(len(MOMENTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationPeak:
    """Bytes of activations at the moment at which each stage's memory peaks: arrays of shape [stages]."""

    moment: NDArray[np.intp]
    """Index of the moment in MOMENTS."""
    attention: Floats
    """Bytes that attention saves, over all micro-batches in flight."""
    dense_mlp: Floats
    """Bytes that dense MLPs save, over all micro-batches in flight."""
    experts: Floats
    """Bytes that layers with experts save in their MLP, over all micro-batches in flight."""
    checkpoints: Floats
    """Bytes of the saved inputs of recomputed layers."""
    loss: Floats
    """Bytes that the final norm, the output layer and the loss save."""
    transient: Floats
    """Bytes that exist only at this moment, in addition to all saved activations."""

    def total(self) -> Floats:
        """Return all bytes of activations at the peak; shape [stages]."""
        kept = self.attention + self.dense_mlp + self.experts + self.checkpoints
        return kept + self.loss + self.transient


def activation_peak(
    share: RankShare, stages: StagesInFlight, state: ModelState, vocabulary: Floats, mtp: Floats
) -> ActivationPeak:
    """Return the bytes of activations at the moment at which each stage's memory peaks in training.

    The moment "build" is left out.

    Args:
        share: The rank's share.
        stages: The stages.
        state: The state of the model on the stages.
        vocabulary: Rows of the embedding on a rank, one value per layout.
        mtp: Number of layers of multi-token prediction of each stage, shape [stages, (DENSE, MOE)].
    """
    row, last = stages.row, stages.last
    attention_half, dense_half = attention(share), dense_mlp(share)
    experts_half = experts_mlp(share) if share.model.is_moe else dense_half
    loss_head, state_bytes = head(share, vocabulary), share.state[row]
    # Bytes that one layer of each kind saves per micro-batch, shape [stages, 3 kinds].
    sizes = np.stack(
        [attention_half.kept + dense_half.kept, attention_half.kept + experts_half.kept, share.state], axis=1
    )[row]
    predicting = _predicting(share, stages, mtp)
    in_flight, at_loss = stages.in_flight + predicting, stages.at_loss + predicting
    full = (in_flight * sizes).sum(axis=1)
    first_chunk = (stages.first_chunk * sizes).sum(axis=1)
    mtp_around = mtp_extra(share)[row]
    loss = np.where(last, loss_head.kept[row] + mtp.sum(axis=1) * mtp_around, 0)

    # The backward pass goes through the main loss, then the layers of multi-token prediction, then the final norm.
    predicted = predicting.sum(axis=1) * mtp_around
    predicted += np.where(last & (mtp.sum(axis=1) > 0), loss_head.norm[row], 0)
    embedding = np.where(stages.first, vocabulary[row] * share.model.hidden_size * share.size, 0)
    adam = adam_step(share, vocabulary[row], state.optimizer / share.workload.adam_bytes)
    transients = np.stack(
        [
            _layer_transient(share, (attention_half, dense_half, experts_half), stages, in_flight, sizes),
            np.where(last, loss_head.backward[row], 0),
            np.where(stages.first, embedding + state_bytes + state.reducing_embedding, 0),
            np.maximum(adam, state.reducing),
        ]
    )
    transients[LAYER] += predicted
    transients[[LAYER, LOSS]] += pipeline_tensors(share, row, stages.rank > 0, stages.forwards_left)
    overlapped = _overlapped_reduction(share, stages, state, vocabulary, sizes=sizes, full=full)
    transients[LAYER] = np.maximum(transients[LAYER], overlapped)

    kept = np.stack([full, (at_loss * sizes).sum(axis=1) + loss, full - first_chunk, np.zeros_like(full)])
    moment = np.argmax(kept + transients, axis=0)
    counts = np.where((moment == LOSS)[:, None], at_loss, in_flight)
    counts = counts - np.where(moment == EMBEDDING, 1, 0)[:, None] * stages.first_chunk
    counts = np.where(moment == OPTIMIZER, 0, 1)[:, None] * counts
    return ActivationPeak(
        moment=moment,
        attention=(counts[:, DENSE] + counts[:, MOE]) * attention_half.kept[row],
        dense_mlp=counts[:, DENSE] * dense_half.kept[row],
        experts=counts[:, MOE] * experts_half.kept[row],
        checkpoints=counts[:, CHECKPOINTS] * state_bytes,
        loss=np.where(moment == LOSS, loss, 0),
        transient=np.take_along_axis(transients, moment[None], axis=0)[0],
    )


def _overlapped_reduction(
    share: RankShare,
    stages: StagesInFlight,
    state: ModelState,
    vocabulary: Floats,
    *,
    sizes: Floats,
    full: Floats,
) -> Floats:
    """Return the bytes beyond `full` that a stage needs when it reduces its first gradients during the backward pass.

    Gradients are reduced bucket by bucket. The first bucket is reduced during the backward pass of the last
    micro-batch. By then the activations of all other micro-batches are freed, and so are those of the layers whose
    gradients are in this bucket, except for one of the layers that are recomputed together. The result may be negative,
    and is 0 without overlap_grad_reduce.

    Args:
        share: The rank's share.
        stages: The stages.
        state: The state of the model on the stages.
        vocabulary: Rows of the embedding on a rank, one value per layout.
        sizes: Bytes that one layer of each kind saves per micro-batch, shape [stages, (DENSE, MOE, CHECKPOINTS)].
        full: Bytes that all micro-batches in flight save on each stage.
    """
    row = stages.row
    first_chunk = (stages.first_chunk * sizes).sum(axis=1)
    micro_batch = np.minimum(first_chunk * share.columns["vpp"][row], full)
    working = stages.working.sum(axis=1)
    recomputed_layer = (stages.working * sizes[:, :2]).sum(axis=1) / np.maximum(working, 1)
    output_weights = np.where(stages.last, vocabulary[row] * share.model.hidden_size, 0)
    output = output_weights * float(share.workload.gradient_bytes)
    # The share of the layers that are done is estimated as the share of the gradients that are in the bucket. The
    # gradients of the output layer do not count.
    done = np.maximum(state.reducing - output, 0) / np.maximum(state.gradients - output, 1)
    left = 1 - np.minimum(done, 1)
    needed = state.reducing + share.state[row] + recomputed_layer - full + micro_batch * left
    return np.where(share.columns.on("overlap_grad_reduce")[row], needed, 0)


def _predicting(share: RankShare, stages: StagesInFlight, mtp: Floats) -> Floats:
    """Return how many layers of multi-token prediction have saved activations on each stage.

    The counts are summed over all micro-batches whose loss is not computed yet. The result has shape [stages, kinds];
    the kinds are DENSE, MOE and CHECKPOINTS. `mtp` is the number of these layers on each stage.
    """
    kept = mtp * np.where(stages.last, 1, stages.last_chunk_in_flight)[:, None]
    # Multi-token prediction recomputes each of its layers under the uniform method, and none under the block method.
    checkpointed = share.columns.among("recompute_method", "uniform")[stages.row]
    return np.column_stack([np.where(checkpointed[:, None], 0, kept), checkpointed * kept.sum(axis=1)])


def _layer_transient(
    share: RankShare,
    halves: tuple[HalfLayer, HalfLayer, HalfLayer],
    stages: StagesInFlight,
    in_flight: Floats,
    sizes: Floats,
) -> Floats:
    """Return the bytes that a stage needs in addition to all saved activations while its most demanding layer runs.

    This layer is in its forward pass when all micro-batches are in flight, or in its backward pass. The backward pass
    goes from the last layer to the first and frees what each layer saved. If the layer is not of the last layer's kind
    (dense or with experts), the bytes of at least one layer are free when its backward pass begins. Under full
    recomputation, the result includes the activations that are computed again.

    Args:
        share: The rank's share.
        halves: Bytes of attention, of a dense MLP, and of an MLP with experts.
        stages: The stages.
        in_flight: Layers in flight, with those of multi-token prediction, shape [stages, (DENSE, MOE, CHECKPOINTS)].
        sizes: Bytes that one layer of each kind saves per micro-batch, shape [stages, (DENSE, MOE, CHECKPOINTS)].
    """
    row, (attention_half, *mlps) = stages.row, halves
    works = stages.working.sum(axis=1) > 0
    # While a forward pass runs, variables of the schedule still hold the last gradient from the next stage and the last
    # input from the previous stage. While a layer is recomputed, they hold the gradient that this layer waits for.
    held = np.where(works | ~stages.last, 1, 0) + (stages.rank > 0) * ~works
    waits = np.where(works | (stages.pp > 1), held, 0) * sizes[:, CHECKPOINTS]
    # A forward pass runs beside the first backward pass only if the stage has forward passes left.
    beside = share.overlaps_experts[row] & (stages.forwards_left > 0)
    needed = np.stack([_layer_needs(attention_half, mlp, row, waits, beside) for mlp in mlps], axis=1)
    last_kind = stages.last_is_moe.astype(np.int64)[:, None]
    by_last = np.take_along_axis(needed, last_kind, axis=1)[:, 0]
    by_other = np.take_along_axis(needed, 1 - last_kind, axis=1)[:, 0]
    freed = np.take_along_axis(sizes, last_kind, axis=1)[:, 0]
    is_mixed = (stages.layers.min(axis=1) > 0) & ~works
    worst = np.where(is_mixed, np.maximum(by_last, by_other - freed), by_last)
    recomputed = (stages.working * sizes[:, :2]).sum(axis=1)
    # Under block recompute, the backward pass begins with the layers that are not recomputed. A recomputed layer also
    # saves its output.
    recomputed += np.where(~works & (in_flight[:, CHECKPOINTS] > 0), sizes[:, CHECKPOINTS], 0)
    return np.where(in_flight.sum(axis=1) > 0, worst + recomputed, 0)


def _layer_needs(
    attention_half: HalfLayer, mlp: HalfLayer, row: Ints, waits: Floats, beside: Bools
) -> Floats:
    """Return the bytes that one layer needs beyond those it saves, at the worst moment of its two passes.

    Args:
        attention_half: Bytes of the layer's attention, one value per layout.
        mlp: Bytes of the layer's MLP, one value per layout.
        row: Index of the layout of each stage.
        waits: Bytes that variables of the pipeline schedule hold while the layer runs forward.
        beside: Whether a layer of the next micro-batch runs forward beside the backward pass of this layer. The
            attention of the former is done when the MLP of this layer runs backward, and its MLP is done when the
            attention of this layer runs backward (megatron/core/models/common/model_chunk_schedule_plan.py, run).
    """
    in_mlp = mlp.dropped[row] + np.maximum(mlp.forward[row] + waits, mlp.backward[row])
    in_mlp += np.where(beside, attention_half.kept[row], 0)
    in_attention = (attention_half.dropped + attention_half.backward - mlp.kept)[row]
    in_attention += np.where(beside, (attention_half.kept + mlp.kept)[row], 0)
    worst: Floats = np.maximum(in_mlp, in_attention)
    return worst
