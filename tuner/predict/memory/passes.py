"""The forward passes of a pipeline rank before its first backward pass, and the layers whose activations they save.

1F1B does `pp - rank` forward passes before the first backward pass. The interleaved schedule takes a group of
`microbatch_group_size_per_vp_stage` micro-batches through a chunk before it goes to the next chunk. Before the first
backward pass, it goes once through all chunks but the last, which is `(vpp - 1) * group` passes, and does `2 * (pp -
rank - 1) + 1` passes more (megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches). Without the overlap
of expert communication, the last of these passes already belongs to the steady phase, in which each forward pass is
followed by a backward pass. With the overlap, it still belongs to the warm-up; each later forward pass then runs layer
by layer beside a backward pass, which frees as many layers.
"""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.layout import num_microbatches
from tuner.core.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Numbers of forward passes through model chunks on many pipeline ranks; arrays have one value per stage."""

    vpp: Ints
    """Number of chunks on the rank."""
    group: Ints
    """Number of micro-batches that the schedule takes through one chunk before it goes to the next chunk."""
    before_backward: Ints
    """Number of forward passes before the first backward pass."""
    total: Ints
    """Number of forward passes in a step: micro-batches times chunks."""

    def of_last_chunk(self) -> Ints:
        """Return how many of the forward passes before the first backward pass go through the last chunk."""
        rounds, rest = np.divmod(self.before_backward, self.group * self.vpp)
        through_last: Ints = rounds * self.group + np.maximum(rest - (self.vpp - 1) * self.group, 0)
        return through_last


def passes_of(c: Columns, workload: Workload, dp: Ints, row: Ints, rank: Ints) -> Passes:
    """Return the numbers of forward passes on each of many stages.

    Args:
        c: The layouts.
        workload: The workload.
        dp: Data parallel size of each layout.
        row: Index in `c` of the layout of each stage.
        rank: Pipeline rank of each stage.
    """
    stated_group = c["microbatch_group_size_per_vp_stage"]
    group = np.where(stated_group > 0, stated_group, c["pp"])[row]
    micro_batches = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)[row]
    pp, vpp = c["pp"][row], c["vpp"][row]
    total = micro_batches * vpp
    interleaved = 2 * (pp - rank - 1) + (vpp - 1) * group + 1
    before_backward = np.minimum(np.where(vpp > 1, interleaved, pp - rank), total)
    return Passes(vpp=vpp, group=group, before_backward=before_backward, total=total)


class KeptLayers:
    """Counts of the layers with saved activations on the stages of many pipelines: arrays of shape [stages, kinds].

    The kinds are DENSE, MOE and CHECKPOINTS of tuner/predict/memory/stages.py.
    """

    def __init__(self, kept_by_chunk: list[Floats], stage: Ints, passes: Passes) -> None:
        """Add up the layers whose activations one micro-batch saves, chunk by chunk.

        Args:
            kept_by_chunk: Number of layers with saved activations in each chunk for one micro-batch: one array per
                partition, of shape [distinct stages of the partition, chunks, kinds].
            stage: Index of each stage in the concatenation of `kept_by_chunk`.
            passes: The forward passes of each stage.
        """
        self._passes = passes
        # Entry i along the axis of chunks is the count of the first i chunks together.
        first_chunks = [np.pad(np.cumsum(kept, axis=1), ((0, 0), (1, 0), (0, 0))) for kept in kept_by_chunk]
        sizes = np.concatenate([np.full(len(part), part.shape[1]) for part in first_chunks])
        self._start = np.concatenate([[0], np.cumsum(sizes)])[stage]
        self._flat = np.concatenate([part.reshape(-1, part.shape[2]) for part in first_chunks])
        self.before_backward: Floats = self.by(passes.before_backward)
        """Number of layers with saved activations on each stage just before its first backward pass."""

    def by(self, passes: Ints) -> Floats:
        """Return how many layers have saved activations on each stage after the first `passes` forward passes.

        The result has shape [stages, kinds] and is as if no backward pass had run.
        """
        vpp, group = self._passes.vpp, self._passes.group
        rounds, rest = np.divmod(passes, group * vpp)
        chunk, part = np.divmod(rest, group)
        before, after = self._first_chunks(chunk), self._first_chunks(np.minimum(chunk + 1, vpp))
        kept: Floats = (rounds * group)[:, None] * self._first_chunks(vpp) + group[:, None] * before
        kept += part[:, None] * (after - before)
        return kept

    def most(self) -> Floats:
        """Return the largest number of layers with saved activations at any time of a step, shape [stages, kinds].

        The number is largest just before the first backward pass, unless the last chunk has fewer layers than the other
        chunks. Then it may be larger after a group of micro-batches ran backward through the last chunk.
        """
        vpp, group, forwards = self._passes.vpp, self._passes.group, self._passes.before_backward
        first = self.before_backward
        last_chunk = self._first_chunks(vpp) - self._first_chunks(vpp - 1)
        later = self.by(np.minimum(forwards + group, self._passes.total)) - group[:, None] * last_chunk
        more = (vpp > 1) & (forwards < self._passes.total) & (later.sum(axis=1) > first.sum(axis=1))
        return np.where(more[:, None], later, first)

    def _first_chunks(self, chunks: Ints) -> Floats:
        """Return how many layers in each stage's first `chunks` chunks have activations saved by one micro-batch."""
        return self._flat[self._start + chunks]
