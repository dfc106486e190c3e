"""Megatron-FSDP and the distributed optimizer: how they split the model's state, and how long their collectives take.

Sources: megatron/core/distributed/fsdp/src/megatron_fsdp (megatron_fsdp.py, param_and_grad_buffer.py) of Megatron-Core
0.16; Rajbhandari et al., arXiv:1910.02054.
"""

from typing import Final, NamedTuple

import numpy as np

from tuner.core.columns import Bools, Columns, Floats, Ints
from tuner.core.workload import Workload
from tuner.predict.nccl import registered_factor
from tuner.predict.time.collectives import ProcessGroups
from tuner.predict.time.rates import Rates

PREFETCHED_WEIGHTS: Final = 500_000_000
"""Number of weights that are gathered ahead of the layer that needs them. Published: megatron_fsdp.py,
suggested_AG_prefetch_size."""
UNITS_AT_ONCE: Final = 2
"""Number of layers whose unsplit gradients are in memory at the same time: one layer's gradients are computed while
those of the layer before are scattered. With double buffers, the unsplit weights of as many layers are in memory.
Published: megatron_fsdp.py, param_and_grad_buffer.py."""
LEAST_BUCKET: Final = 40_000_000
"""Smallest number of gradients in a bucket, which Megatron's DDP reduces together; Megatron-FSDP has such buckets
unless it splits the weights layer by layer. Published: distributed_data_parallel.py, bucket_size."""
BUCKET_PER_RANK: Final = 1_000_000
"""Smallest number of gradients in a bucket of Megatron's DDP, per rank that reduces them. Published:
distributed_data_parallel.py, bucket_size."""
BACKWARD_SHARE: Final = 2 / 3
"""Share of the backward pass in the time of a micro-batch. Gradients are reduced during the backward pass, and
parameters are gathered during the forward pass. It follows from the FLOPs: the backward pass has twice as many as the
forward pass."""


class Shares(NamedTuple):
    """The number of ranks over which each part of the model's state is split, one value per layout; 1 means unsplit."""

    weights: Ints
    gradients: Ints
    optimizer: Ints


def shares(c: Columns, ranks: Ints) -> Shares:
    """Return the number of ranks over which weights, gradients and optimizer state are split.

    `ranks` is the number of ranks that would hold equal copies of these weights without splitting, one value per
    layout. Megatron-FSDP splits the parts that its sharding strategy names. Without Megatron-FSDP, the distributed
    optimizer splits only the optimizer state, and nothing else is split.
    """
    one = np.ones_like(ranks)
    fsdp, split_optimizer = c.on("use_megatron_fsdp"), c.on("use_distributed_optimizer")
    if not fsdp.any():
        return Shares(one, one, np.where(split_optimizer, ranks, 1))
    split_optimizer = np.where(fsdp, ~_strategy(c, "no_shard"), split_optimizer)
    return Shares(
        np.where(gathers_weights(c), ranks, 1),
        np.where(scatters_gradients(c), ranks, 1),
        np.where(split_optimizer, ranks, 1),
    )


def bucket(ranks: Ints) -> Ints:
    """Return the number of gradients in one bucket, which is reduced as a whole over `ranks` data parallel ranks."""
    return np.maximum(LEAST_BUCKET, BUCKET_PER_RANK * ranks)


def gathers_weights(c: Columns) -> Bools:
    """Return a mask of the layouts in which Megatron-FSDP splits the weights; shape [rows]."""
    return c.on("use_megatron_fsdp") & _strategy(c, "optim_grads_params")


def scatters_gradients(c: Columns) -> Bools:
    """Return a mask of the layouts in which Megatron-FSDP splits the gradients; shape [rows]."""
    return c.on("use_megatron_fsdp") & _strategy(c, "optim_grads", "optim_grads_params")


def _strategy(c: Columns, *names: str) -> Bools:
    return c.among("data_parallel_sharding_strategy", *names)


def whole_bytes(
    c: Columns,
    row: Ints,
    workload: Workload,
    *,
    layers: Floats,
    layer_weights: Floats,
    table_weights: Floats,
    ranks: Ints,
) -> Floats:
    """Return the bytes of unsplit weights and gradients that a rank of each stage needs temporarily; shape [stages].

    The result is 0 for what Megatron-FSDP does not split. Layers are gathered one at a time, and further weights are
    prefetched (`PREFETCHED_WEIGHTS`). The embedding and the output layer are gathered by themselves. Registered buffers
    (nccl_ub) have room for two layers each, during the whole run.

    Args:
        c: The layouts.
        row: Index in `c` of the layout of each stage.
        workload: The workload.
        layers: Number of layers of each stage.
        layer_weights: Number of weights of these layers.
        table_weights: Number of weights of the embedding or the output layer of each stage; 0 if it has neither.
        ranks: Number of ranks over which the weights are split, one value per layout.
    """
    unit = layer_weights / np.maximum(layers, 1)
    split_weights, split_gradients = gathers_weights(c)[row], scatters_gradients(c)[row]
    ahead = np.where(c.on("nccl_ub")[row], UNITS_AT_ONCE * unit, 2 * unit + PREFETCHED_WEIGHTS)
    gathered = (np.minimum(ahead, layer_weights) + table_weights) * float(workload.weight_bytes)
    reduced_together = np.where(split_weights, unit, bucket(ranks)[row])
    scattered = np.minimum(UNITS_AT_ONCE * reduced_together, layer_weights) + table_weights
    scattered_bytes = scattered * float(workload.gradient_bytes)
    return np.where(split_weights, gathered, 0.0) + np.where(split_gradients, scattered_bytes, 0.0)


def exposed_ms(
    c: Columns,
    rates: Rates,
    group: ProcessGroups,
    *,
    weights: Floats,
    layers: Floats,
    pass_ms: Floats,
    num_microbatches: Ints,
) -> Floats:
    """Return the exposed time in ms per step of Megatron-FSDP's collectives: the part that no computation hides.

    The result has shape [rows] and depends on what is split. If the weights are split, each micro-batch gathers them
    twice, for the forward and for the backward pass. If the gradients are split, each micro-batch scatters them. All
    other collectives run once per step. The collectives of a layer run during the computation of the layers next to it;
    nothing hides those of the first layer.

    Args:
        c: The layouts.
        rates: Rates of the machine.
        group: The ranks over which the weights are split.
        weights: Number of weights of the rank.
        layers: Number of layers of the rank.
        pass_ms: Time of one micro-batch on the rank, forward and backward, in ms.
        num_microbatches: Micro-batches per step.
    """
    units = np.maximum(layers, 1.0)
    factor = registered_factor(c, group)
    gather_ms = units * factor * rates.gather_ms(weights / units * rates.parameter_bytes, group)
    gradient_bytes = weights / units * rates.gradient_bytes
    scatter_ms = units * factor * rates.gather_ms(gradient_bytes, group, "reduce_scatter")
    reduce_ms = np.where(_strategy(c, "no_shard"), units * rates.reduce_ms(gradient_bytes, group), scatter_ms)

    def uncovered(travel_ms: Floats, beside_ms: Floats) -> Floats:
        covered = np.minimum(travel_ms * (1 - 1 / units), beside_ms)
        uncovered_ms: Floats = travel_ms - rates.host_runs_ahead * covered
        return uncovered_ms

    forward_ms, backward_ms = (1 - BACKWARD_SHARE) * pass_ms, BACKWARD_SHARE * pass_ms
    split_weights, split_gradients = gathers_weights(c), scatters_gradients(c)
    both_passes = uncovered(gather_ms, forward_ms) + uncovered(gather_ms + scatter_ms, backward_ms)
    # Megatron-FSDP overlaps a reduce-scatter that every micro-batch has, even if overlap_grad_reduce is off.
    overlaps = split_gradients | c.on("overlap_grad_reduce")
    times = np.where(split_gradients, num_microbatches, 1)
    reducing = times * np.where(overlaps, uncovered(reduce_ms, backward_ms), reduce_ms)
    once = np.where(c.on("overlap_param_gather"), uncovered(gather_ms, forward_ms), gather_ms)
    gathering = np.where(_strategy(c, "no_shard"), 0.0, once)
    exposed = np.where(split_weights, num_microbatches * both_passes, reducing + gathering)
    return np.where((group.size > 1) & (weights > 0), exposed, 0.0)
