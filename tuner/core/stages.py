"""Counts of the layers on the first, a middle and the last pipeline rank, for many layouts at once."""

from typing import NamedTuple

import numpy as np

from tuner.core.columns import Columns, Ints
from tuner.core.workload import Workload


class StageLayers(NamedTuple):
    """A count for the first, a middle and the last pipeline rank of each layout: arrays of shape [rows].

    The counts have a meaning only for layouts that the rules of the split accept. `middle` has a value even in a
    pipeline without a middle rank.
    """

    first: Ints
    """Count for the first rank."""
    middle: Ints
    """Count for a middle rank."""
    last: Ints
    """Count for the last rank."""


def stage_slots(c: Columns, workload: Workload) -> StageLayers:
    """Return the slots of each pipeline rank, all of its chunks together.

    A slot is a layer; the embedding and the loss take one slot each if the split accounts for them. Source:
    Megatron-Core, transformer_block.py, get_num_layers_to_build.
    """
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    spread = workload.model.num_layers - first - last + accounted_slots(c)
    middle = spread // np.maximum(unstated_stages(c), 1)
    return StageLayers(np.where(first > 0, first, middle), middle, np.where(last > 0, last, middle))


def chunk_layers(c: Columns, workload: Workload) -> StageLayers:
    """Return the layers of the first chunk of the model, of a chunk in between, and of the last chunk of the model.

    A layout that writes out its pipeline has other counts: see `decoders` in tuner/core/pipeline_layout.py.
    """
    slots = stage_slots(c, workload)
    embedding = c.on("account_for_embedding_in_pipeline_split") & (c["pp"] > 1)
    loss = c.on("account_for_loss_in_pipeline_split") & (c["pp"] > 1)
    vpp = c["vpp"]
    return StageLayers(slots.first // vpp - embedding, slots.middle // vpp, slots.last // vpp - loss)


def accounted_slots(c: Columns) -> Ints:
    """Return the number of slots that embedding and loss take: 0, 1 or 2.

    With pp 1 it is 0: a single stage holds all layers, whatever the knobs say.
    """
    both = c.on("account_for_embedding_in_pipeline_split").astype(np.int64)
    both += c.on("account_for_loss_in_pipeline_split")
    return np.where(c["pp"] > 1, both, 0)


def unstated_stages(c: Columns) -> Ints:
    """Return the number of stages whose number of layers no knob states."""
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    unstated: Ints = c["pp"] - (first > 0) - (last > 0)
    return unstated
