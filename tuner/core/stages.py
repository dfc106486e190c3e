"""How the layers of a model lie on pipeline stages and their chunks, for many layouts at once."""

from typing import NamedTuple

import numpy as np

from tuner.core.columns import Columns, Ints
from tuner.core.workload import Workload


class StageLayers(NamedTuple):
    """Slots of layers on the first, a middle and the last pipeline rank, all chunks together.

    A slot is a layer, or the embedding or the loss where the split counts them as one, at the cost of a
    layer.
    Meaningful where the split rules hold; `middle` also where there is no middle rank.
    """

    first: Ints
    middle: Ints
    last: Ints


def stage_slots(c: Columns, w: Workload) -> StageLayers:
    """Slots a pipeline rank, as Megatron's get_num_layers_to_build spreads them."""
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    spread = w.model.num_layers - first - last + accounted_slots(c)
    middle = spread // np.maximum(unstated_stages(c), 1)
    return StageLayers(np.where(first > 0, first, middle), middle, np.where(last > 0, last, middle))


def chunk_layers(c: Columns, w: Workload) -> StageLayers:
    """Layers in the very first chunk, in one between, and in the very last chunk of the model.

    Of layouts whose layers no text places: tuner.core.pipeline_layout counts those.
    """
    slots = stage_slots(c, w)
    emb = c.on("account_for_embedding_in_pipeline_split") & (c["pp"] > 1)
    loss = c.on("account_for_loss_in_pipeline_split") & (c["pp"] > 1)
    vpp = c["vpp"]
    return StageLayers(slots.first // vpp - emb, slots.middle // vpp, slots.last // vpp - loss)


def accounted_slots(c: Columns) -> Ints:
    """Slots that embedding and loss take; on a single stage they take one and give it back."""
    both = c.on("account_for_embedding_in_pipeline_split").astype(np.int64)
    both += c.on("account_for_loss_in_pipeline_split")
    return np.where(c["pp"] > 1, both, 0)


def unstated_stages(c: Columns) -> Ints:
    """Stages whose layers are not stated."""
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    left: Ints = c["pp"] - (first > 0) - (last > 0)
    return left
