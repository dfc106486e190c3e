"""Forward passes that a pipeline rank does before its first backward pass, and the layers that they keep.

1F1B does `pp - rank` forward passes before the first backward pass. The interleaved schedule goes once through all
chunks but the last, which is `(vpp - 1) * group` passes, and does `2 * (pp - rank - 1) + 1` passes more. It takes
`group` micro-batches through a chunk before it goes to the next chunk (megatron/core/pipeline_parallel/schedules.py,
get_pp_rank_microbatches). Without the overlap of expert communication, the last of these passes already belongs to
the steady phase, in which each forward pass is followed by a backward pass. With the overlap, it still belongs to the
warm-up; each later forward pass then goes layer by layer beside a backward pass, which frees as many layers.
"""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.layout import num_microbatches
from tuner.core.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Forward passes of model chunks on the ranks of many pipelines; arrays have one value per stage."""

    vpp: Ints
    """Chunks of the rank."""
    group: Ints
    """Micro-batches that the schedule takes through one chunk before it goes to the next chunk."""
    before_backward: Ints
    """Forward passes before the first backward pass."""
    total: Ints
    """Forward passes in a step: micro-batches times chunks."""

    def of_last_chunk(self) -> Ints:
        """Return how many of the passes before the first backward pass go through the last chunk."""
        rounds, rest = np.divmod(self.before_backward, self.group * self.vpp)
        through_last: Ints = rounds * self.group + np.maximum(rest - (self.vpp - 1) * self.group, 0)
        return through_last


def passes_of(c: Columns, workload: Workload, dp: Ints, row: Ints, rank: Ints) -> Passes:
    """Return the passes of stages: `row` is the layout of each stage, `rank` its pipeline rank."""
    stated_group = c["microbatch_group_size_per_vp_stage"]
    group = np.where(stated_group > 0, stated_group, c["pp"])[row]
    micro_batches = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)[row]
    pp, vpp = c["pp"][row], c["vpp"][row]
    total = micro_batches * vpp
    interleaved = 2 * (pp - rank - 1) + (vpp - 1) * group + 1
    before_backward = np.minimum(np.where(vpp > 1, interleaved, pp - rank), total)
    return Passes(vpp=vpp, group=group, before_backward=before_backward, total=total)


class KeptLayers:
    """Layers that forward passes keep on the stages of many pipelines: arrays of shape [stages, kinds]."""

    def __init__(self, kept_by_chunk: list[Floats], stage: Ints, passes: Passes) -> None:
        """Add up the layers that one micro-batch keeps.

        Args:
            kept_by_chunk: Arrays of shape [distinct stages, chunks, kinds], each for the stages of one partition.
            stage: Index of each stage among all distinct stages, in the order of `kept_by_chunk`.
            passes: The passes of each stage.
        """
        self._passes = passes
        # Entry i along the axis of chunks is what the first i chunks keep together.
        first_chunks = [np.pad(np.cumsum(kept, axis=1), ((0, 0), (1, 0), (0, 0))) for kept in kept_by_chunk]
        sizes = np.concatenate([np.full(len(part), part.shape[1]) for part in first_chunks])
        self._start = np.concatenate([[0], np.cumsum(sizes)])[stage]
        self._flat = np.concatenate([part.reshape(-1, part.shape[2]) for part in first_chunks])
        self.before_backward: Floats = self.by(passes.before_backward)
        """Layers that each stage keeps just before its first backward pass."""

    def by(self, passes: Ints) -> Floats:
        """Return the layers that the first `passes` forward passes of each stage keep."""
        vpp, group = self._passes.vpp, self._passes.group
        rounds, rest = np.divmod(passes, group * vpp)
        chunk, part = np.divmod(rest, group)
        before, after = self._first_chunks(chunk), self._first_chunks(np.minimum(chunk + 1, vpp))
        kept: Floats = (rounds * group)[:, None] * self._first_chunks(vpp) + group[:, None] * before
        kept += part[:, None] * (after - before)
        return kept

    def most(self) -> Floats:
        """Return the most layers that a stage keeps in a step.

        A stage keeps most just before its first backward pass, unless its last chunk has fewer layers than its other
        chunks: then more may be in flight after a group of micro-batches went backward through the last chunk.
        """
        vpp, group, forwards = self._passes.vpp, self._passes.group, self._passes.before_backward
        first = self.before_backward
        last_chunk = self._first_chunks(vpp) - self._first_chunks(vpp - 1)
        later = self.by(np.minimum(forwards + group, self._passes.total)) - group[:, None] * last_chunk
        more = (vpp > 1) & (forwards < self._passes.total) & (later.sum(axis=1) > first.sum(axis=1))
        return np.where(more[:, None], later, first)

    def _first_chunks(self, chunks: Ints) -> Floats:
        """Return the layers that one micro-batch keeps in the first `chunks` chunks of each stage."""
        return self._flat[self._start + chunks]
