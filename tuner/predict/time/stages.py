"""How many layers of each kind the pipeline ranks of many layouts hold."""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.flops import slides
from tuner.core.partition import Partition, partitions
from tuner.core.workload import Model, Workload


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A kind of layer: all layers of a kind cost the same."""

    moe: bool
    """Whether the layer has experts."""
    sliding: bool
    """Whether attention sees a window of the sequence only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersByRank:
    """What the pipeline ranks that differ from each other hold: arrays of shape [ranks, rows], with 3 ranks or more.

    The ranks of a layout are the first, a middle and the last one, as far as it has them; the remaining entries are 0.
    If kinds of layers alternate, these ranks hold mean counts, which may be fractions. The ranks of a layout that
    writes out its pipeline are all those that differ from each other, in no particular order, with exact counts.
    """

    layers: dict[LayerKind, Floats]
    """Layers of each kind. A layer of multi-token prediction counts as one more layer of the kind of the last layer."""
    totals: dict[LayerKind, int]
    """Layers of each kind in the whole model."""
    heads: Floats
    """Output layers with their loss: one, and one more for each token predicted beyond the next."""
    embeddings: Floats
    """Embeddings."""


def layers_by_rank(workload: Workload, c: Columns) -> LayersByRank:
    """Return what the pipeline ranks of layouts hold; the pipeline rules must accept the layouts."""
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
    """Return the layers of each kind, the heads and the embeddings of the ranks that differ: [kinds + 2, ranks]."""
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
    """Return the decoder layers of each kind on every rank: [kinds, ranks]."""
    layers: Floats = (before[:, partition.end] - before[:, partition.begin]).sum(axis=2).astype(np.float64)
    return layers


def _mean(partition: Partition, before: Ints, pattern: tuple[LayerKind, ...]) -> Floats:
    """Return the decoder layers of each kind on every rank, as a mean where kinds alternate: [kinds, ranks].

    Layers in front of the first one of the last kind (dense layers in front of those with experts) are in the first
    chunk. All other chunks hold each kind by its share in the layers from there on.
    """
    leading = pattern.index(pattern[-1])
    share = (before[:, -1] - before[:, leading]) / (len(pattern) - leading)
    layers = partition.layers.sum(axis=1)
    held: Floats = share[:, None] * layers
    first_chunk = partition.end[0, 0]
    held[:, 0] = before[:, first_chunk] + (layers[0] - first_chunk) * share
    return held


def _pattern(model: Model) -> tuple[LayerKind, ...]:
    """Return the kind of every layer, in order."""
    return tuple(
        LayerKind(moe, slides(model, number)) for number, moe in enumerate(model.moe_layer_pattern(), start=1)
    )
