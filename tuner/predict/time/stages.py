"""Which layers the first, a middle and the last pipeline rank hold, for many layouts at once."""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Columns
from tuner.core.flops import slides
from tuner.core.pipeline_layout import EMBEDDING, LOSS, decoders, mtp_layers, parse
from tuner.core.stages import chunk_layers, stage_slots
from tuner.core.workload import Model, Workload
from tuner.predict.time.collectives import Floats


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that cost the same."""

    moe: bool
    sliding: bool


@dataclass(frozen=True, slots=True)
class Stages:
    """What the first, a middle and the last rank of a pipeline hold: arrays of shape [3, rows].

    A pipeline of one rank is a first rank that holds all; one of two has no middle. Where kinds of layers
    alternate, a count may be a fraction: the mean of the ranks between. A pipeline that is written out has each
    rank that differs from the others instead, which may take more than 3.
    """

    layers: dict[Kind, Floats]
    """How many of each kind; multi-token-prediction layers are on the last rank, or where they are written."""
    totals: dict[Kind, int]
    """How many of each kind the whole model has."""
    heads: Floats
    """Output layers with their loss: one, and one more for each token predicted beyond the next."""
    embeddings: Floats


def stages(workload: Workload, c: Columns) -> Stages:
    """Spread the layers as Megatron does (transformer_block.py, get_num_layers_to_build)."""
    model, pp = workload.model, c["pp"]
    pattern, mtp = _pattern(model), model.mtp_num_layers or 0
    slots, chunks = stage_slots(c, workload), chunk_layers(c, workload)
    first = slots.first - c.on("account_for_embedding_in_pipeline_split")
    last = slots.last - c.on("account_for_loss_in_pipeline_split")
    # The layers before the first of the last kind (dense ones before experts) are in the first chunk.
    lead = pattern.index(pattern[-1])
    begin = np.clip(np.minimum(chunks.first, first), 0, len(pattern))
    layers, totals = {}, {}
    for kind in dict.fromkeys(pattern):
        before = np.cumsum([0, *(each == kind for each in pattern)])
        body = float(before[-1] - before[lead]) / (len(pattern) - lead)
        extra = mtp * (pattern[-1] == kind)
        totals[kind] = int(before[-1]) + extra
        layers[kind] = np.stack(
            [
                np.where(pp == 1, totals[kind], before[begin] + (first - begin) * body),
                np.where(pp > 2, slots.middle * body, 0.0),
                np.where(pp > 1, last * body + extra, 0.0),
            ]
        )
    none = np.zeros(len(pp))
    heads = np.stack([np.where(pp == 1, 1.0 + mtp, 0.0), none, np.where(pp > 1, 1.0 + mtp, 0.0)])
    return _written_out(Stages(layers, totals, heads, np.stack([none + 1, none, none])), c, model)


def _written_out(spread: Stages, c: Columns, model: Model) -> Stages:
    """The same, where `pipeline_model_parallel_layout` says what each rank holds, by its word."""
    column, pp = c.column("pipeline_model_parallel_layout"), c["pp"]
    texts = {code: text for code, text in enumerate(column.categories) if text != "none"}
    pairs = {(code, size) for code in texts for size in np.unique(pp[column.codes == code])}
    if not pairs:
        return spread
    held = {(code, size): _ranks(texts[code], int(size), model) for code, size in pairs}
    most = max(3, *(ranks.shape[1] for ranks in held.values()))
    parts = np.stack([*spread.layers.values(), spread.heads, spread.embeddings])
    parts = np.pad(parts, ((0, 0), (0, most - 3), (0, 0)))
    for (code, size), ranks in held.items():
        rows = (column.codes == code) & (pp == size)
        parts[:, :, rows] = np.pad(ranks, ((0, 0), (0, most - ranks.shape[1])))[:, :, None]
    return Stages(dict(zip(spread.layers, parts[:-2], strict=True)), spread.totals, parts[-2], parts[-1])


def _ranks(text: str, pp: int, model: Model) -> Floats:
    """Layers of each kind, output layers and embeddings of the ranks that differ: shape [kinds + 2, ranks]."""
    pattern, chunks = _pattern(model), parse(text)
    rank = np.arange(len(chunks)) % pp
    of_layer = np.repeat(rank, decoders(text))
    numbers = np.array([list(dict.fromkeys(pattern)).index(kind) for kind in pattern])
    predicting = np.bincount(rank, mtp_layers(text), pp)
    counts = [np.bincount(of_layer[numbers == kind], minlength=pp) for kind in range(numbers.max() + 1)]
    counts[numbers[-1]] = counts[numbers[-1]] + predicting
    heads = np.bincount(rank, [(LOSS in chunk) * (1 + (model.mtp_num_layers or 0)) for chunk in chunks], pp)
    embeddings = np.bincount(rank, [EMBEDDING in chunk for chunk in chunks], pp)
    return np.unique(np.stack([*counts, heads, embeddings]).astype(np.float64), axis=1)


def _pattern(model: Model) -> tuple[Kind, ...]:
    """The kind of every layer, in order."""
    return tuple(
        Kind(moe, slides(model, number)) for number, moe in enumerate(model.moe_layer_pattern(), start=1)
    )
