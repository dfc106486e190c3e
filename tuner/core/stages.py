"""Numbers of layers on the first, a middle and the last pipeline rank, for many layouts at once."""

from typing import NamedTuple

import numpy as np

from tuner.core.columns import Columns, Ints
from tuner.core.workload import Workload


class StageLayers(NamedTuple):
    """A number of layers or slots for the first, a middle and the last pipeline rank or chunk: arrays of shape [rows].

    The numbers have a meaning only for layouts that satisfy the rules for pipelines. `middle` has a value even in a
    pipeline without a middle rank.
    """

    first: Ints
    """Number for the first rank or chunk."""
    middle: Ints
    """Number for a middle rank or chunk."""
    last: Ints
    """Number for the last rank or chunk."""


def stage_slots(c: Columns, workload: Workload) -> StageLayers:
    """Return the number of slots on each pipeline rank, all of its chunks together.

    Each layer takes a slot, and so does the embedding or the loss if `account_for_embedding_in_pipeline_split` or
    `account_for_loss_in_pipeline_split` is on. Source: Megatron-Core, transformer_block.py, get_num_layers_to_build.
    """
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    spread = workload.model.num_layers - first - last + accounted_slots(c)
    middle = spread // np.maximum(unstated_stages(c), 1)
    return StageLayers(np.where(first > 0, first, middle), middle, np.where(last > 0, last, middle))


def chunk_layers(c: Columns, workload: Workload) -> StageLayers:
    """Return the number of layers in the model's first chunk, in a chunk in between, and in its last chunk.

    It does not apply to a layout that states `pipeline_model_parallel_layout`, whose chunks `decoders` counts
    (tuner/core/pipeline_layout.py).
    """
    slots = stage_slots(c, workload)
    embedding = c.on("account_for_embedding_in_pipeline_split") & (c["pp"] > 1)
    loss = c.on("account_for_loss_in_pipeline_split") & (c["pp"] > 1)
    vpp = c["vpp"]
    return StageLayers(slots.first // vpp - embedding, slots.middle // vpp, slots.last // vpp - loss)


def accounted_slots(c: Columns) -> Ints:
    """Return the number of slots that the embedding and the loss take: 0, 1 or 2.

    With pp 1 it is 0: the single stage has all layers, whatever the knobs say.
    """
    both = c.on("account_for_embedding_in_pipeline_split").astype(np.int64)
    both += c.on("account_for_loss_in_pipeline_split")
    return np.where(c["pp"] > 1, both, 0)


def unstated_stages(c: Columns) -> Ints:
    """Return the number of stages whose number of layers is not stated by a knob."""
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    unstated: Ints = c["pp"] - (first > 0) - (last > 0)
    return unstated
