"""Megatron-FSDP and the distributed optimizer: over how many ranks weights, gradients and optimizer are split, what is
whole for a while, and the collectives that nothing hides.

Source: megatron/core/distributed/fsdp/src/megatron_fsdp (megatron_fsdp.py, param_and_grad_buffer.py) of
Megatron-Core 0.16; Rajbhandari et al., arXiv:1910.02054.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Bools, Columns, Ints
from tuner.predict.nccl import registered_factor
from tuner.predict.time.collectives import ProcessGroups
from tuner.predict.time.rates import Rates

Floats = NDArray[np.float64]

PREFETCHED_WEIGHTS: Final = 500_000_000
"""Weights that are gathered ahead of the layer that needs them (megatron_fsdp.py: suggested_AG_prefetch_size)."""
UNITS_AT_ONCE: Final = 2
"""Layers whose gradients are whole: one is filled while the one before is scattered; of double buffers the weights'
likewise."""
LEAST_BUCKET: Final = 40_000_000
"""Gradients that Megatron's DDP reduces together, where layers are no units, at least (ddp_bucket_size)."""
BUCKET_EACH: Final = 1_000_000
"""And at least so many for each rank (distributed_data_parallel.py: bucket_size)."""
BACKWARD_SHARE: Final = 2 / 3
"""Of a micro-batch's pass: backward, beside which gradients travel; parameters travel beside the rest."""


class Shares(NamedTuple):
    """The ranks over which each is split, one value a layout."""

    weights: Ints
    gradients: Ints
    optimizer: Ints


def shares(c: Columns, ranks: Ints) -> Shares:
    """Of weights that `ranks` ranks share, by strategy; without FSDP the distributed optimizer splits its own alone."""
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
    """Gradients that go together over so many ranks."""
    return np.maximum(LEAST_BUCKET, BUCKET_EACH * ranks)


def gathers_weights(c: Columns) -> Bools:
    """Where each rank holds a part of the weights alone."""
    return c.on("use_megatron_fsdp") & _strategy(c, "optim_grads_params")


def scatters_gradients(c: Columns) -> Bools:
    """Where each rank holds a part of the gradients alone."""
    return c.on("use_megatron_fsdp") & _strategy(c, "optim_grads", "optim_grads_params")


def _strategy(c: Columns, *names: str) -> Bools:
    return c.among("data_parallel_sharding_strategy", *names)


def whole_bytes(
    c: Columns,
    row: Ints,
    layers: Floats,
    held: Floats,
    table: Floats,
    weight: float,
    gradient: float,
    ranks: Ints,
) -> Floats:
    """Bytes of weights and gradients that are whole for a while, of stages of layouts `row` that hold so many layers
    and, in them, weights.

    `table` is the weights of an embedding or output layer, which are gathered by themselves; the others go a layer at a
    time, and ahead of it as many as are prefetched. Registered buffers (nccl_ub) are two layers each, for good.
    """
    unit = held / np.maximum(layers, 1)
    split_weights, split_gradients = gathers_weights(c)[row], scatters_gradients(c)[row]
    ahead = np.where(c.on("nccl_ub")[row], UNITS_AT_ONCE * unit, 2 * unit + PREFETCHED_WEIGHTS)
    gathered = (np.minimum(ahead, held) + table) * weight
    of_bucket = np.where(split_weights, unit, bucket(ranks)[row])
    scattered = (np.minimum(UNITS_AT_ONCE * of_bucket, held) + table) * gradient
    return np.where(split_weights, gathered, 0.0) + np.where(split_gradients, scattered, 0.0)


def exposed_ms(
    held: Floats, ranks: ProcessGroups, layers: Floats, pass_ms: Floats, count: Ints, c: Columns, rates: Rates
) -> Floats:
    """What nothing hides in a step of the collectives of `held` weights in so many layers.

    With the weights split, each micro-batch gathers them twice, forward and backward; with the gradients split, each
    scatters them; all else goes once a step. A layer's collectives run beside its neighbours' passes; those of
    the first have nothing beside them.
    """
    units = np.maximum(layers, 1.0)
    factor = registered_factor(c, ranks)
    gathered = units * factor * rates.gather_ms(held / units * rates.parameter_bytes, ranks)
    gradients = held / units * rates.gradient_bytes
    scattered = units * factor * rates.gather_ms(gradients, ranks, "reduce_scatter")
    reduced = np.where(_strategy(c, "no_shard"), units * rates.reduce_ms(gradients, ranks), scattered)

    def uncovered(travel: Floats, beside_ms: Floats) -> Floats:
        left: Floats = travel - rates.host_runs_ahead * np.minimum(travel * (1 - 1 / units), beside_ms)
        return left

    forward_ms, backward_ms = (1 - BACKWARD_SHARE) * pass_ms, BACKWARD_SHARE * pass_ms
    split_weights, split_gradients = gathers_weights(c), scatters_gradients(c)
    everything = count * (uncovered(gathered, forward_ms) + uncovered(gathered + scattered, backward_ms))
    # Megatron-FSDP overlaps what it does every micro-batch, whatever the switches say.
    overlapped = split_gradients | c.on("overlap_grad_reduce")
    times = np.where(split_gradients, count, 1)
    reducing = times * np.where(overlapped, uncovered(reduced, backward_ms), reduced)
    once = np.where(c.on("overlap_param_gather"), uncovered(gathered, forward_ms), gathered)
    gathering = np.where(_strategy(c, "no_shard"), 0.0, once)
    exposed = np.where(split_weights, everything, reducing + gathering)
    return np.where((ranks.size > 1) & (held > 0), exposed, 0.0)
