"""The slowest pipeline rank, the bubble in which the other ranks wait, and the messages between pipeline ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.workload import Workload
from tuner.predict.time.collectives import process_groups
from tuner.predict.time.model_parts import ModelPart
from tuner.predict.time.rates import Rates


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """The times of the pipeline in one step, under each layout: arrays of shape [rows], in milliseconds."""

    counted: list[Floats]
    """For each part of the model, in the order of `parts`: how many of its layers, heads or embeddings count towards
    the step time. This is the number on the slowest rank, or the mean over the ranks if the ranks share cores."""
    slowest_ms: Floats
    """Time of one micro-batch on the slowest rank, forward and backward."""
    bubble_ms: Floats
    """Time in which a rank waits while the pipeline fills and drains."""


def pipeline_times(
    parts: Sequence[ModelPart], c: Columns, rates: Rates, num_microbatches: Ints
) -> PipelineTimes:
    """Return the times of the pipeline in one step, under each layout; `parts` are all parts of the model."""
    rank_ms = reduce(add, (part.on_rank * part.total_ms for part in parts))
    slowest = np.argmax(rank_ms, axis=0)
    slowest_ms = _at_rank(rank_ms, slowest)
    model_ms = reduce(add, (part.in_model * part.total_ms for part in parts))
    # While the pipeline fills and drains, a rank waits for one pass of one chunk on every other rank.
    filled_ms = num_microbatches * slowest_ms + np.maximum(model_ms - slowest_ms, 0.0) / c["vpp"]
    if rates.ranks_per_core > 1:
        counted = [part.in_model / c["pp"] for part in parts]
        mean_ms = num_microbatches * model_ms / c["pp"]
        bubble_ms = _shared_bubble_ms(c, rates, mean_ms=mean_ms, slowest_ms=slowest_ms, filled_ms=filled_ms)
    else:
        counted = [_at_rank(part.on_rank, slowest) for part in parts]
        bubble_ms = filled_ms - num_microbatches * slowest_ms
    return PipelineTimes(counted, slowest_ms, bubble_ms)


def _at_rank(values: Floats, rank: NDArray[np.intp]) -> Floats:
    """Return the value at `rank` in each row; `values` has the shape [ranks, rows], and `rank` has the shape [rows]."""
    value: Floats = np.take_along_axis(values, rank[None], axis=0)[0]
    return value


def _shared_bubble_ms(
    c: Columns, rates: Rates, *, mean_ms: Floats, slowest_ms: Floats, filled_ms: Floats
) -> Floats:
    """Return the bubble in ms of a pipeline whose ranks share cores; shape [rows].

    A rank that waits leaves its core to the others, so a step takes at least the mean work of the ranks. The bubble is
    the time beyond this work. It has two lower bounds, of which the larger is returned. First, cores idle at the start,
    while only the first stages have work, and at the end, while only the last stages have work. Second, a chain of
    passes that wait for each other is no faster than with one core per pass.

    Args:
        c: The layouts.
        rates: How fast the ranks are.
        mean_ms: Mean time that a rank works in a step, in ms.
        slowest_ms: Time of one micro-batch on the slowest rank, in ms.
        filled_ms: Time of a step in which no rank leaves its core to another, in ms.
    """
    cores = rates.cluster.world_size / rates.ranks_per_core
    ranks_per_stage = rates.cluster.world_size / c["pp"]
    idle_stages = np.ceil(cores / ranks_per_stage) - 1
    idle_passes = idle_stages - ranks_per_stage * idle_stages * (idle_stages + 1) / 2 / cores
    idle_ms = idle_passes * slowest_ms / c["vpp"] / rates.ranks_per_core
    bubble_ms: Floats = np.maximum(idle_ms, filled_ms / rates.ranks_per_core - mean_ms)
    return bubble_ms


def messages_ms(c: Columns, workload: Workload, rates: Rates, num_microbatches: Ints) -> Floats:
    """Return the exposed time in ms per step of messages between pipeline ranks: the part that no computation hides.

    A message carries activations or their gradients. Without overlap, the messages of every micro-batch and chunk
    count. With overlap, only the messages that fill the pipeline count.
    """
    pp, vpp = c["pp"], c["vpp"]
    sequence_shards = np.where(c.on("sp"), c["tp"], 1) * c["cp"]
    tokens = c["micro_batch_size"] * workload.seq_length / sequence_shards
    group = process_groups(pp, rates.cluster.world_size // pp, rates.cluster)
    sent_bytes = tokens * workload.model.hidden_size * rates.state_bytes
    there_and_back_ms = 2 * rates.send_ms(sent_bytes, group)
    overlaps = c.on("overlap_p2p_comm") & rates.host_runs_ahead
    exposed_messages = np.where(overlaps, 0, num_microbatches * vpp)
    return np.where(pp > 1, there_and_back_ms * (exposed_messages + pp - 1), 0.0)
