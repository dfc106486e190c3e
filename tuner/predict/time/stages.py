"""How many layers of each kind, heads and embeddings the pipeline ranks of many layouts have."""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.flops import slides
from tuner.core.partition import Partition, partitions
from tuner.core.workload import Model, Workload


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A kind of layer; all layers of one kind take equally long."""

    moe: bool
    """Whether the layer has experts."""
    sliding: bool
    """Whether attention sees only a window of the sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersByRank:
    """The numbers of layers, heads and embeddings on the pipeline ranks of each layout: arrays of shape [ranks, rows].

    The axis of ranks has at least 3 entries: the first, a middle and the last rank of a layout, since all middle ranks
    are alike. The entries of ranks that a layout lacks are 0. If kinds of layers alternate, the numbers are means and
    may be fractions. A layout that sets `pipeline_model_parallel_layout` has one entry for each distinct rank, in no
    particular order, with exact numbers.
    """

    layers: dict[LayerKind, Floats]
    """Number of layers of each kind. A layer of multi-token prediction counts as one more layer of the last layer's
    kind."""
    totals: dict[LayerKind, int]
    """Number of layers of each kind in the whole model."""
    heads: Floats
    """Number of output layers with their loss. The rank that computes the loss has one, and one more for each layer of
    multi-token prediction."""
    embeddings: Floats
    """Number of embeddings."""


def layers_by_rank(workload: Workload, c: Columns) -> LayersByRank:
    """Return how many layers, heads and embeddings the pipeline ranks of each layout have.

    The pipeline rules must accept all layouts in `c`.
    """
    split, pattern = partitions(c, workload), _pattern(workload.model)
    distinct = [_held(partition, workload.model, pattern) for partition in split.distinct]
    ranks = max(3, *(held.shape[1] for held in distinct))
    padded = [np.pad(held, ((0, 0), (0, ranks - held.shape[1]))) for held in distinct]
    *layers, heads, embeddings = np.stack(padded, axis=-1)[..., split.of_row]
    kinds = list(dict.fromkeys(pattern))
    mtp = workload.model.mtp_num_layers or 0
    return LayersByRank(
        layers=dict(zip(kinds, layers, strict=True)),
        totals={kind: pattern.count(kind) + mtp * (kind == pattern[-1]) for kind in kinds},
        heads=heads,
        embeddings=embeddings,
    )


def _held(partition: Partition, model: Model, pattern: tuple[LayerKind, ...]) -> Floats:
    """Return the numbers of layers of each kind, heads and embeddings on the distinct ranks of a partition.

    The result has shape [kinds + 2, ranks]. `pattern` is the kind of every layer of the model.
    """
    kinds = list(dict.fromkeys(pattern))
    # Entry i of each row is the number of layers of that kind among the first i layers of the model.
    before = np.array([np.cumsum([0, *(kind == other for other in pattern)]) for kind in kinds])
    layers = _exact(partition, before) if partition.is_written else _mean(partition, before, pattern)
    layers[kinds.index(pattern[-1])] += partition.mtp_layers.sum(axis=1)
    heads = partition.losses.sum(axis=1) * (1.0 + (model.mtp_num_layers or 0))
    held = np.stack([*layers, heads, partition.embeddings.sum(axis=1)])
    if partition.is_written:
        return np.unique(held, axis=1)
    return held if len(partition.end) < 3 else held[:, [0, 1, -1]]


def _exact(partition: Partition, before: Ints) -> Floats:
    """Return the number of decoder layers of each kind on every rank: [kinds, ranks].

    `before[k, i]` is the number of layers of kind k among the first i layers of the model.
    """
    layers: Floats = (before[:, partition.end] - before[:, partition.begin]).sum(axis=2).astype(np.float64)
    return layers


def _mean(partition: Partition, before: Ints, pattern: tuple[LayerKind, ...]) -> Floats:
    """Return the estimated number of decoder layers of each kind on every rank; shape [kinds, ranks].

    Layers that come before all layers of the last layer's kind (dense layers before those with experts) are in the
    first chunk. All other chunks have each kind in proportion to its share of the remaining layers. `before[k, i]` is
    the number of layers of kind k among the first i layers of the model, and `pattern` is the kind of every layer.
    """
    leading = pattern.index(pattern[-1])
    share = (before[:, -1] - before[:, leading]) / (len(pattern) - leading)
    layers = partition.layers.sum(axis=1)
    held: Floats = share[:, None] * layers
    first_chunk = partition.end[0, 0]
    held[:, 0] = before[:, first_chunk] + (layers[0] - first_chunk) * share
    return held


def _pattern(model: Model) -> tuple[LayerKind, ...]:
    """Return the kind of every decoder layer of the model, in order."""
    return tuple(
        LayerKind(moe, slides(model, number)) for number, moe in enumerate(model.moe_layer_pattern(), start=1)
    )
