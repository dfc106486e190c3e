"""Which layers the first, a middle and the last pipeline rank hold, for many layouts at once."""

from dataclasses import dataclass

import numpy as np

from tuner.flops import slides
from tuner.predict.collectives import Floats
from tuner.rules.base import Columns
from tuner.rules.pipeline import chunk_layers, stage_slots
from tuner.workload import Model, Workload


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that cost the same."""

    moe: bool
    sliding: bool


@dataclass(frozen=True, slots=True)
class Stages:
    """What the first, a middle and the last rank of a pipeline hold: arrays of shape [3, rows].

    A pipeline of one rank is a first rank that holds all; one of two has no middle. Where kinds of layers
    alternate, a count may be a fraction: the mean of the ranks between.
    """

    layers: dict[Kind, Floats]
    """How many of each kind; multi-token-prediction layers are on the last rank."""
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
    return Stages(layers, totals, heads, np.stack([none + 1, none, none]))


def _pattern(model: Model) -> tuple[Kind, ...]:
    """The kind of every layer, in order."""
    return tuple(
        Kind(moe, slides(model, number)) for number, moe in enumerate(model.moe_layer_pattern(), start=1)
    )
