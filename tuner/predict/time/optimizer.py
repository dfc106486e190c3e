"""The time in ms to reduce gradients, update weights and gather parameters, once per step."""

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.layout import data_parallel_size, expert_data_parallel_size
from tuner.core.parameters import attention, dense_mlp, expert, layer_norms, router, shared_experts
from tuner.core.workload import Model, Workload
from tuner.predict import fsdp, nccl
from tuner.predict.time.collectives import ProcessGroups, process_groups
from tuner.predict.time.rates import Rates
from tuner.predict.time.stages import LayersByRank

OPTIMIZER_BYTES: Final = 30
"""Bytes that Adam moves per parameter. Counted: it reads and writes the master weight and two moments (fp32), reads the
gradient (fp32) and writes the parameter (16 bits)."""
CLEAR_PASSES: Final = 2
"""Passes over the local gradients in addition to that of the update. Counted: one sets them to zero, one reads them for
their norm."""
TENSOR_LAUNCHES: Final = 40
"""Operations that the host launches per weight tensor if the optimizer is not fused. Counted for torch on CPU: Adam,
clipping and copies are 20 operations. Assumed: the Python around them takes the time of 20 more."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """Either the weights outside routed experts or those in them, on the rank that has most of them: shape [rows]."""

    parameters: Floats
    replicas: ProcessGroups
    """The ranks with copies of these weights, which reduce their gradients."""
    split: fsdp.Shares
    """The number of ranks over which weights, gradients and optimizer state are split."""


def optimizer_times(
    c: Columns,
    workload: Workload,
    rates: Rates,
    split: LayersByRank,
    *,
    pass_ms: Floats,
    num_microbatches: Ints,
) -> dict[str, Floats]:
    """Return the times in ms of the parts of a step after its micro-batches, by name, each of shape [rows].

    "dp_ms" is the exposed time of reducing gradients and gathering parameters, which no computation hides.
    "optimizer_ms" is the time of updating the weights. Both are times of the rank with the most parameters.

    Args:
        c: The layouts.
        workload: The workload.
        rates: Rates of the machine.
        split: The parts of the model on each pipeline rank.
        pass_ms: Time of one micro-batch on this rank, forward and backward, in ms.
        num_microbatches: Micro-batches per step.
    """
    dense, routed = _weights(c, workload.model, rates, split)
    exposed_ms = _exposed_ms(dense, pass_ms, c, rates) + _exposed_ms(routed, pass_ms, c, rates)
    uses_fsdp = c.on("use_megatron_fsdp")
    if uses_fsdp.any():
        layers = reduce(add, split.layers.values()).max(axis=0)
        dense_ms, routed_ms = (
            fsdp.exposed_ms(
                c,
                rates,
                weights.replicas,
                weights=weights.parameters,
                layers=layers,
                pass_ms=pass_ms,
                num_microbatches=num_microbatches,
            )
            for weights in (dense, routed)
        )
        exposed_ms = np.where(uses_fsdp, dense_ms + routed_ms, exposed_ms)
    update_ms = _update_ms(dense, routed, rates)
    if not rates.host_runs_ahead:
        dense_tensors, routed_tensors = _held_tensors(workload.model, split, c)
        updated_tensors = dense_tensors / dense.split.optimizer + routed_tensors / routed.split.optimizer
        update_ms = update_ms + TENSOR_LAUNCHES * rates.launch_ms * updated_tensors
    return {"dp_ms": exposed_ms, "optimizer_ms": update_ms}


def _update_ms(dense: _Weights, routed: _Weights, rates: Rates) -> Floats:
    """Return the time in ms in which the GPU updates the weights and clears the gradients; shape [rows]."""
    updated = dense.parameters / dense.split.optimizer + routed.parameters / routed.split.optimizer
    gradients = dense.parameters / dense.split.gradients + routed.parameters / routed.split.gradients
    return rates.moved_ms(OPTIMIZER_BYTES * updated + CLEAR_PASSES * gradients * rates.gradient_bytes)


def _weights(c: Columns, model: Model, rates: Rates, split: LayersByRank) -> tuple[_Weights, _Weights]:
    """Return the weights outside routed experts, and the weights of routed experts."""
    world = rates.cluster.world_size
    tp, pp, cp, ep, etp = (c[name] for name in ("tp", "pp", "cp", "ep", "etp"))
    dense_replicas = process_groups(data_parallel_size(world, tp, pp, cp) * cp, tp, rates.cluster)
    expert_replicas = process_groups(expert_data_parallel_size(world, pp, ep, etp), ep * etp, rates.cluster)
    dense_parameters, expert_parameters = _held_parameters(model, split, c)
    return (
        _Weights(dense_parameters, dense_replicas, fsdp.shares(c, dense_replicas.size)),
        _Weights(expert_parameters, expert_replicas, fsdp.shares(c, expert_replicas.size)),
    )


def _exposed_ms(weights: _Weights, pass_ms: Floats, c: Columns, rates: Rates) -> Floats:
    """Return the exposed time in ms of the collectives of these weights: the part that the passes do not hide.

    The collectives reduce the gradients and, with the distributed optimizer, gather the weights. `pass_ms` is the time
    of one micro-batch, forward and backward.
    """
    held, group = weights.parameters, weights.replicas
    gradient_bytes = held * rates.gradient_bytes
    distributed = c.on("use_distributed_optimizer")
    registered_factor = nccl.registered_factor(c, group)
    reduce_factor = nccl.all_reduce_factor(c, group, rates.cluster, rates.measured("all_reduce"))
    scatter_ms = registered_factor * rates.gather_ms(gradient_bytes, group, "reduce_scatter")
    reduce_ms = np.where(distributed, scatter_ms, reduce_factor * rates.reduce_ms(gradient_bytes, group))
    gather_ms = registered_factor * rates.gather_ms(held * rates.parameter_bytes, group)
    gather_ms = np.where(distributed, gather_ms, 0.0)
    # Nothing runs beside the collective of the last bucket.
    covered = rates.host_runs_ahead * (1 - np.minimum(fsdp.LEAST_BUCKET / np.maximum(held, 1), 1.0))
    beside_backward_ms = np.minimum(reduce_ms * covered, fsdp.BACKWARD_SHARE * pass_ms)
    beside_forward_ms = np.minimum(gather_ms * covered, (1 - fsdp.BACKWARD_SHARE) * pass_ms)
    hidden_reduce_ms = beside_backward_ms * c.on("overlap_grad_reduce")
    hidden_gather_ms = beside_forward_ms * c.on("overlap_param_gather")
    exposed_ms = reduce_ms - hidden_reduce_ms + gather_ms - hidden_gather_ms
    return np.where((group.size > 1) & (held > 0), exposed_ms, 0.0)


def _held_tensors(model: Model, split: LayersByRank, c: Columns) -> tuple[Floats, Floats]:
    """Return the largest number of weight tensors on any rank: first outside routed experts, then of routed experts.

    Counted in Megatron-Core: a layer has two norms, two weights of attention (five of multi-latent attention), two
    norms of queries and keys if there are any, and either two weights of an MLP or a router and two weights of a shared
    expert. A routed expert has two weights, a head two, an embedding one.
    """
    dense = split.embeddings + 2 * split.heads
    routed = np.zeros_like(dense)
    for kind, layers in split.layers.items():
        norms_and_attention = 2 + (5 if model.multi_latent_attention else 2) + 2 * model.qk_layernorm
        mlp = 1 + 2 * bool(model.moe_shared_expert_intermediate_size) if kind.moe else 2
        dense = dense + layers * (norms_and_attention + mlp)
        if kind.moe:
            routed = routed + layers * 2 * (model.num_moe_experts or 0) / c["ep"]
    return dense.max(axis=0), routed.max(axis=0)


def _held_parameters(model: Model, split: LayersByRank, c: Columns) -> tuple[Floats, Floats]:
    """Return the largest number of parameters on any rank: first outside routed experts, then of routed experts."""
    tp = c["tp"]
    vocabulary = model.padded_vocab_size(1) * model.hidden_size / tp
    output_layers = np.minimum(split.heads, 1.0)
    if model.share_embeddings_and_output_weights:
        output_layers = output_layers * (1 - split.embeddings)
    dense = (split.embeddings + output_layers) * vocabulary
    routed = np.zeros_like(dense)
    for kind, layers in split.layers.items():
        mlp = shared_experts(model) if kind.moe else dense_mlp(model)
        sharded = attention(model).sharded + mlp.sharded
        replicated = attention(model).replicated + layer_norms(model) + mlp.replicated
        if kind.moe:
            replicated += router(model)
            one_expert, local_experts = expert(model), (model.num_moe_experts or 0) / c["ep"]
            routed = routed + layers * local_experts * (one_expert.sharded / c["etp"] + one_expert.replicated)
        dense = dense + layers * (sharded / tp + replicated)
    return dense.max(axis=0), routed.max(axis=0)
