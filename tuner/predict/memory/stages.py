"""The pipeline stages of many layouts as one flat table: which layers each holds, how many are in flight.

Stages of a layout with equal contents differ in the micro-batches in flight alone, and the earliest has the most:
only it is kept unless all are asked for. Layouts that split their layers alike share their stages.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Columns
from tuner.core.layout import num_microbatches
from tuner.core.pipeline_layout import decoders, mtp_layers
from tuner.core.stages import stage_slots
from tuner.core.workload import Model, Workload

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DENSE, MOE, CHECKPOINTS = 0, 1, 2
"""What a chunk keeps a micro-batch: layers with a dense MLP, layers with experts, inputs of recomputed layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """One entry a stage of a layout, `row` after `row`; counts of layers are [entries, 2 or 3 kinds]."""

    row: Ints
    """Index of the layout."""
    pp: Ints
    rank: Ints
    """Pipeline rank."""
    first: NDArray[np.bool_]
    """Holds the embedding."""
    last: NDArray[np.bool_]
    """Holds final norm, output layer and loss."""
    predicts: NDArray[np.bool_]
    """Holds the layers of multi-token prediction."""
    layers: Floats
    """Layers whose weights it holds: dense, with experts."""
    in_flight: Floats
    """Kept at the peak, over all micro-batches in flight: dense layers, layers with experts, checkpoints."""
    at_loss: Floats
    """The same when a loss is taken: before the first backward, to which the schedule comes back every round."""
    forwards_left: Ints
    """Forward passes of chunks that follow after the first backward."""
    last_in_flight: Ints
    """Micro-batches of its last chunk in flight then."""
    first_chunk: Floats
    """Kept of one micro-batch by its first chunk, likewise."""
    working: Floats
    """Layers recomputed at once by full recompute in the chunk that goes backward first: dense, with experts."""
    last_is_moe: NDArray[np.bool_]
    """Whether the layer that goes backward first has experts; where there is no layer, False."""


def stages_of(columns: Columns, workload: Workload, dp: Ints, every: bool = False) -> Stages:
    """Return the stages of layouts that the pipeline rules accept; `every` keeps the equal ones too."""
    keys, texts = _split_keys(columns, workload)
    # One number a key sorts many times faster than rows of numbers do.
    _, index, key_of_row = np.unique(
        np.ravel_multi_index(tuple(keys), tuple(keys.max(axis=1) + 1)), return_index=True, return_inverse=True
    )
    tables = [_Split(workload.model, key, texts, every) for key in keys[:, index].T]
    counts = np.array([len(table.ranks) for table in tables])
    starts = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(len(key_of_row)), counts[key_of_row])
    before = np.cumsum(counts[key_of_row]) - counts[key_of_row]
    entry = starts[key_of_row[row]] + np.arange(len(row)) - before[row]
    rank = np.concatenate([table.ranks for table in tables])[entry]
    in_flight, at_loss, forwards_left, last_in_flight = _in_flight(
        columns, workload, dp, tables, entry, row, rank
    )
    return Stages(
        row=row,
        pp=columns["pp"][row],
        rank=rank,
        first=rank == 0,
        last=rank == columns["pp"][row] - 1,
        predicts=np.concatenate([table.predicts for table in tables])[entry],
        layers=np.concatenate([table.layers for table in tables])[entry],
        in_flight=in_flight,
        at_loss=at_loss,
        forwards_left=forwards_left,
        last_in_flight=last_in_flight,
        first_chunk=np.concatenate([table.kept[:, 0] for table in tables])[entry],
        working=np.concatenate([table.working for table in tables])[entry],
        last_is_moe=np.concatenate([table.last_is_moe for table in tables])[entry],
    )


def _split_keys(c: Columns, workload: Workload) -> tuple[Ints, list[str]]:
    """[keys, rows], and the texts that the first counts: a pipeline's text from 1, 0 for none, pp, vpp, slots of
    first, middle and last rank, what is accounted for, full recompute.
    """
    column = c.column("pipeline_model_parallel_layout")
    texts = [text for text in column.categories if text != "none"]
    text = np.array([texts.index(each) + 1 if each in texts else 0 for each in column.categories])[
        column.codes
    ]
    spread = text == 0
    slots = [np.where(spread, slot, 0) for slot in stage_slots(c, workload)]
    accounts = (c["pp"] > 1) & spread
    full = c.among("recompute_granularity", "full")
    columns = (
        text,
        c["pp"],
        c["vpp"],
        *slots,
        c.on("account_for_embedding_in_pipeline_split") & accounts,
        c.on("account_for_loss_in_pipeline_split") & accounts,
        np.where(full & c.among("recompute_method", "uniform"), c["recompute_num_layers"], 0),
        np.where(full & c.among("recompute_method", "block"), c["recompute_num_layers"], 0),
    )
    return np.stack([np.asarray(column, dtype=np.int64) for column in columns]), texts


class _Split:
    """One way to split the layers: what each pipeline rank's chunks keep, by rank."""

    def __init__(self, model: Model, key: Ints, texts: list[str], every: bool) -> None:
        text, pp, vpp, first, middle, last, embedding, loss, uniform, block = (int(value) for value in key)
        self.ranks = np.arange(pp)
        self.predicts = (self.ranks == pp - 1) & bool(model.mtp_num_layers)
        if text:
            counts = decoders(texts[text - 1]).reshape(vpp, pp)
            self.predicts = mtp_layers(texts[text - 1]).reshape(vpp, pp).any(axis=0)
        else:
            counts = np.full((vpp, pp), middle // vpp)
            counts[:, -1] = last // vpp
            counts[:, 0] = first // vpp
            counts[0, 0] -= embedding
            counts[-1, -1] -= loss
        ends = np.cumsum(counts.reshape(-1)).reshape(vpp, pp)
        moe = np.concatenate([[0], np.cumsum(model.moe_layer_pattern())])
        # [rank, chunk]; Megatron deals the first chunk of every rank, then the second of every rank, ...
        begin, end = (ends - counts).T, ends.T
        experts = moe[end] - moe[begin]
        layers = np.stack([end - begin - experts, experts], axis=-1)
        self.kept = _kept(begin, end, moe, uniform, block)
        self.layers = layers.sum(axis=1).astype(np.float64)
        self.working = _working(begin[:, -1], end[:, -1], moe, uniform, block)
        # The last layer that a rank holds, in whichever chunk; without one, that of multi-token prediction.
        ends = np.where(end > begin, end, 0).max(axis=1)
        of_last = np.where(ends > 0, moe[ends] > moe[np.maximum(ends - 1, 0)], False)
        self.last_is_moe = of_last | ((ends == 0) & self.predicts & model.moe_layer_pattern()[-1])
        if not every:
            self._keep_first_of_equals(pp)

    def _keep_first_of_equals(self, pp: int) -> None:
        same = np.column_stack([self.kept.reshape(pp, -1), self.layers, self.working, self.last_is_moe])
        same = np.column_stack([same, self.ranks == 0, self.ranks == pp - 1, self.predicts])
        chosen = np.sort(np.unique(same, axis=0, return_index=True)[1])
        for name in ("kept", "layers", "working", "last_is_moe", "ranks", "predicts"):
            setattr(self, name, getattr(self, name)[chosen])


def _kept(begin: Ints, end: Ints, moe: Ints, uniform: int, block: int) -> Floats:
    """Per [rank, chunk]: dense layers, layers with experts and checkpoints that one micro-batch keeps."""
    kept = np.zeros((*begin.shape, 3))
    if uniform:
        kept[..., CHECKPOINTS] = -(-(end - begin) // uniform)
        return kept
    middle = np.minimum(begin + block, end)
    kept[..., CHECKPOINTS] = middle - begin
    kept[..., MOE] = moe[end] - moe[middle]
    kept[..., DENSE] = end - middle - kept[..., MOE]
    return kept


def _working(begin: Ints, end: Ints, moe: Ints, uniform: int, block: int) -> Floats:
    """Layers that full recompute brings back at once: the last of a chunk, all of its kind's activations."""
    work = np.zeros((len(begin), 2))
    if uniform or block:
        start = np.maximum(end - max(uniform, 1), begin)
        # Where block recompute leaves layers alone, those go first, and alone they need more than one recomputed.
        recomputes = (end - begin <= block) | bool(uniform)
        work[:, MOE] = np.where(recomputes, moe[end] - moe[start], 0)
        work[:, DENSE] = np.where(recomputes, end - start, 0) - work[:, MOE]
    return work


def _in_flight(
    c: Columns, workload: Workload, dp: Ints, tables: list[_Split], entry: Ints, row: Ints, rank: Ints
) -> tuple[Floats, Floats, Ints, Ints]:
    """What is kept at most; just before the first backward, by the forwards until then in the schedule's order; those
    left; and how many of them were the last chunk's.

    1F1B does `pp - rank` forwards before its first backward; interleaved, `2 * (pp - rank - 1)` more than the
    `(vpp - 1) * group` that walk all chunks once, and one (megatron/core/pipeline_parallel/schedules.py,
    get_pp_rank_microbatches), going through `group` micro-batches of a chunk before it takes the next chunk. With the
    overlap of expert communication the last of them is a warm-up, and each later one goes layer by layer beside a
    backward that frees as many.
    """
    pp, vpp = c["pp"], c["vpp"]
    group = np.where(c["microbatch_group_size_per_vp_stage"] > 0, c["microbatch_group_size_per_vp_stage"], pp)
    micro = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)
    pp, vpp, group, micro = (values[row] for values in (pp, vpp, group, micro))
    interleaved = 2 * (pp - rank - 1) + (vpp - 1) * group + 1
    forwards = np.minimum(np.where(vpp > 1, interleaved, pp - rank), micro * vpp)
    cumulated = [np.pad(np.cumsum(t.kept, axis=1), ((0, 0), (1, 0), (0, 0))) for t in tables]
    sizes = np.concatenate([np.full(len(part), part.shape[1]) for part in cumulated])
    offsets = np.concatenate([[0], np.cumsum(sizes)])[entry]
    flat = np.concatenate([part.reshape(-1, 3) for part in cumulated])

    def kept_by(passes: Ints) -> Floats:
        rounds, rest = np.divmod(passes, group * vpp)
        chunk, part = np.divmod(rest, group)
        before, after = flat[offsets + chunk], flat[offsets + np.minimum(chunk + 1, vpp)]
        kept: Floats = (rounds * group)[:, None] * flat[offsets + vpp] + group[:, None] * before
        kept += part[:, None] * (after - before)
        return kept

    first = kept_by(forwards)
    # Where the last chunk has fewer layers than the others, more are in flight once its group went backward.
    last_chunk = flat[offsets + vpp] - flat[offsets + vpp - 1]
    later = kept_by(np.minimum(forwards + group, micro * vpp)) - group[:, None] * last_chunk
    more = (vpp > 1) & (forwards < micro * vpp) & (later.sum(axis=1) > first.sum(axis=1))
    rounds, rest = np.divmod(forwards, group * vpp)
    of_last = rounds * group + np.maximum(rest - (vpp - 1) * group, 0)
    return np.where(more[:, None], later, first), first, micro * vpp - forwards, of_last
