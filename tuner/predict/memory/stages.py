"""The pipeline stages of many layouts as one flat list: the layers of each stage, and its layers in flight.

Two stages of a layout with equal chunks differ only in the micro-batches in flight, and the earlier stage has more of
them. Only the earliest of equal stages is in the list, unless the caller asks for all. The computation is shared by
layouts that split and recompute their layers alike.
"""

from dataclasses import dataclass, fields

import numpy as np

from tuner.core.columns import Bools, Columns, Floats, Ints
from tuner.core.partition import Partition, partitions
from tuner.core.workload import Model, Workload
from tuner.predict.memory.passes import KeptLayers, passes_of

DENSE, MOE, CHECKPOINTS = 0, 1, 2
"""Indices of the kinds of layers in the last axis of counts: layers with a dense MLP, layers with experts, and
checkpoints, which are recomputed layers of which only the input is saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesInFlight:
    """The stages of many layouts, one entry per stage, ordered by `row`.

    In counts of layers, the last axis has the kinds DENSE, MOE and CHECKPOINTS, unless stated otherwise.
    """

    row: Ints
    """Index of the layout."""
    pp: Ints
    """Number of pipeline ranks of the layout."""
    rank: Ints
    """Pipeline rank of the stage."""
    first: Bools
    """Whether the stage has the embedding."""
    last: Bools
    """Whether the stage has the final norm, the output layer and the loss."""
    predicts: Bools
    """Whether the stage has the layers of multi-token prediction."""
    layers: Floats
    """Number of layers whose weights are on the stage, [entries, (DENSE, MOE)]."""
    in_flight: Floats
    """Number of layers with saved activations at the stage's peak, summed over micro-batches in flight, [entries, 3
    kinds]."""
    at_loss: Floats
    """Number of layers with saved activations just before the stage's first backward pass, when the loss is computed,
    [entries, 3 kinds]. The steady phase of the schedule returns to this state after each group of micro-batches."""
    forwards_left: Ints
    """Number of forward passes of chunks that follow after the first backward pass."""
    last_chunk_in_flight: Ints
    """Number of micro-batches that the last chunk of the stage has in flight just before the first backward pass."""
    first_chunk: Floats
    """Number of layers with saved activations for one micro-batch in the first chunk of the stage, [entries, 3
    kinds]."""
    working: Floats
    """Number of layers that full recomputation computes again at once in the chunk that runs backward first, [entries,
    (DENSE, MOE)]."""
    last_is_moe: Bools
    """Whether the layer that runs backward first has experts; False in a stage without any layer."""


def stages_in_flight(
    columns: Columns, workload: Workload, dp: Ints, *, all_stages: bool = False
) -> StagesInFlight:
    """Return the stages of many layouts, all of which the pipeline rules must accept.

    Args:
        columns: The layouts.
        workload: The workload.
        dp: Data parallel size of each layout.
        all_stages: Whether to return all stages of a layout, not only the earliest of those with equal chunks.
    """
    contents, content_of_row = _distinct_contents(columns, workload, all_stages)
    counts = np.array([len(content.ranks) for content in contents])
    stages_of_row = counts[content_of_row]
    row = np.repeat(np.arange(len(content_of_row)), stages_of_row)
    within_row = np.arange(len(row)) - (np.cumsum(stages_of_row) - stages_of_row)[row]
    # Index of every entry's stage in the concatenated arrays of all contents.
    stage = np.concatenate([[0], np.cumsum(counts)])[content_of_row[row]] + within_row
    rank = np.concatenate([content.ranks for content in contents])[stage]
    passes = passes_of(columns, workload, dp, row, rank)
    kept = KeptLayers([content.kept for content in contents], stage, passes)
    return StagesInFlight(
        row=row,
        pp=columns["pp"][row],
        rank=rank,
        first=rank == 0,
        last=rank == columns["pp"][row] - 1,
        predicts=np.concatenate([content.predicts for content in contents])[stage],
        layers=np.concatenate([content.layers for content in contents])[stage],
        in_flight=kept.most(),
        at_loss=kept.before_backward,
        forwards_left=passes.total - passes.before_backward,
        last_chunk_in_flight=passes.of_last_chunk(),
        first_chunk=np.concatenate([content.kept[:, 0] for content in contents])[stage],
        working=np.concatenate([content.working for content in contents])[stage],
        last_is_moe=np.concatenate([content.last_is_moe for content in contents])[stage],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contents:
    """What the stages of one partition contain under one setting of full recomputation."""

    ranks: Ints
    """Pipeline rank of each stage, shape [stages]."""
    predicts: Bools
    """Whether a stage has the layers of multi-token prediction, shape [stages]."""
    kept: Floats
    """Number of layers of each chunk with saved activations for one micro-batch, by kind (DENSE, MOE, CHECKPOINTS);
    shape [stages, chunks, 3 kinds]."""
    layers: Floats
    """Number of layers of each stage, shape [stages, (DENSE, MOE)]."""
    working: Floats
    """Number of layers that full recomputation computes again at once in a stage's last chunk, shape [stages, (DENSE,
    MOE)]."""
    last_is_moe: Bools
    """Whether the last layer of a stage has experts, shape [stages]."""


def _distinct_contents(c: Columns, workload: Workload, all_stages: bool) -> tuple[list[_Contents], Ints]:
    """Return the distinct contents of the layouts' stages, and the index among them for each layout, shape [rows].

    With `all_stages`, contents include stages that equal an earlier stage of their layout.
    """
    split = partitions(c, workload)
    full = c.among("recompute_granularity", "full")
    uniform = np.where(full & c.among("recompute_method", "uniform"), c["recompute_num_layers"], 0)
    block = np.where(full & c.among("recompute_method", "block"), c["recompute_num_layers"], 0)
    shape = (len(split.distinct), int(uniform.max()) + 1, int(block.max()) + 1)
    keys, of_row = np.unique(np.ravel_multi_index((split.of_row, uniform, block), shape), return_inverse=True)
    model = workload.model
    contents = [
        _contents_of(split.distinct[index], model, int(layers_uniform), int(layers_block))
        for index, layers_uniform, layers_block in zip(*np.unravel_index(keys, shape), strict=True)
    ]
    return contents if all_stages else [_earliest_of_equals(content) for content in contents], of_row


def _contents_of(partition: Partition, model: Model, uniform: int, block: int) -> _Contents:
    """Return the contents of all stages of a partition.

    Args:
        partition: Which layers each chunk has.
        model: The model.
        uniform: `recompute_num_layers` if full recomputation has the method uniform, else 0.
        block: `recompute_num_layers` if full recomputation has the method block, else 0.
    """
    begin, end = partition.begin, partition.end
    # Entry i is the number of layers with experts among the first i layers of the model.
    moe = np.concatenate([[0], np.cumsum(model.moe_layer_pattern())])
    experts = moe[end] - moe[begin]
    predicts: Bools = partition.mtp_layers.sum(axis=1) > 0
    # A rank's last layer may be in any of its chunks. If the rank holds no decoder layer, its last layer is one of
    # multi-token prediction.
    last = np.where(end > begin, end, 0).max(axis=1)
    last_is_moe = np.where(last > 0, moe[last] > moe[np.maximum(last - 1, 0)], False)
    return _Contents(
        ranks=np.arange(len(begin)),
        predicts=predicts,
        kept=_kept(begin, end, moe, uniform, block),
        layers=np.stack([partition.layers - experts, experts], axis=-1).sum(axis=1).astype(np.float64),
        working=_working(begin[:, -1], end[:, -1], moe, uniform, block),
        last_is_moe=last_is_moe | ((last == 0) & predicts & model.moe_layer_pattern()[-1]),
    )


def _earliest_of_equals(contents: _Contents) -> _Contents:
    """Return the contents without those stages that equal an earlier stage in all but the rank."""
    ranks = contents.ranks
    compared = np.column_stack(
        [
            contents.kept.reshape(len(ranks), -1),
            contents.layers,
            contents.working,
            contents.last_is_moe,
            ranks == 0,
            ranks == len(ranks) - 1,
            contents.predicts,
        ]
    )
    earliest = np.sort(np.unique(compared, axis=0, return_index=True)[1])
    return _Contents(**{part.name: getattr(contents, part.name)[earliest] for part in fields(contents)})


def _kept(begin: Ints, end: Ints, moe: Ints, uniform: int, block: int) -> Floats:
    """Return how many layers of each chunk have saved activations for one micro-batch.

    The result has shape [ranks, chunks, kinds]; the kinds are DENSE, MOE and CHECKPOINTS.

    Args:
        begin: Index of the first layer of each chunk, shape [ranks, chunks].
        end: Index after the last layer of each chunk, shape [ranks, chunks].
        moe: Entry i is the number of layers with experts among the first i layers of the model.
        uniform: `recompute_num_layers` if full recomputation has the method uniform, else 0.
        block: `recompute_num_layers` if full recomputation has the method block, else 0.
    """
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
    """Return how many layers full recomputation computes again at once on each rank, shape [ranks, (DENSE, MOE)].

    They are the last layers of the chunk that runs backward first. The arguments are those of `_kept`, but `begin` and
    `end` have only this chunk of each rank, shape [ranks].
    """
    working = np.zeros((len(begin), 2))
    if uniform or block:
        start = np.maximum(end - max(uniform, 1), begin)
        # The layers that block recompute leaves alone run backward first, and each needs more memory than a recomputed
        # one.
        recomputes = (end - begin <= block) | bool(uniform)
        working[:, MOE] = np.where(recomputes, moe[end] - moe[start], 0)
        working[:, DENSE] = np.where(recomputes, end - start, 0) - working[:, MOE]
    return working
