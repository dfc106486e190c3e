"""Activations that wait in the host's memory: what the GPU no longer keeps, and the transfers that nothing hides.

Transformer Engine copies what the first `cpu_offloading_num_layers` layers keep to the host while later layers go
forward, spread evenly over the pass, and back before their backward pass (transformer_engine/pytorch/cpu_offload.py,
AsyncDoubleBufferGroupOffloadHandler). Megatron allows it without a pipeline and without recompute alone.
"""

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Columns, Ints
from tuner.core.workload import Model, Workload
from tuner.predict.implementation import Implementation
from tuner.predict.memory.activations import Layers
from tuner.predict.memory.stages import DENSE, MOE, StagesInFlight

Floats = NDArray[np.float64]

HOST_GB_PER_S: Final = 50.0
"""Between a GPU and its host, one way: 0.8 of the 64 GB/s of PCIe 5.0 x16 (NVIDIA's H100 data sheet: 128 both ways). An
A100 has half of it, a Grace host much more."""


def keep_on_device(stages: StagesInFlight, c: Columns, model: Model) -> StagesInFlight:
    """The stages without what is offloaded; one layer is always on its way and still there."""
    away = c["cpu_offloading_num_layers"][stages.row]
    if not away.any():
        return stages
    gone = _kinds(model, np.maximum(np.minimum(away, model.num_layers) - 1, 0))

    def left(kept: Floats) -> Floats:
        kept = kept.copy()
        kept[:, DENSE] = np.maximum(kept[:, DENSE] - gone[:, DENSE], 0)
        kept[:, MOE] = np.maximum(kept[:, MOE] - gone[:, MOE], 0)
        return kept

    # Without a pipeline a loss is taken when all is in flight.
    in_flight = left(stages.in_flight)
    return replace(stages, in_flight=in_flight, at_loss=in_flight, first_chunk=left(stages.first_chunk))


def _kinds(model: Model, first: Ints) -> Ints:
    """How many of the `first` layers are dense, and how many have experts: shape [rows, 2]."""
    before = np.concatenate([[0], np.cumsum(model.moe_layer_pattern())])[first]
    return np.stack([first - before, before], axis=1)


def exposed_ms(
    c: Columns, workload: Workload, implementation: Implementation, forward_ms: Floats, backward_ms: Floats
) -> Floats:
    """What of one micro-batch's transfers its passes of so many ms do not hide."""
    away = np.minimum(c["cpu_offloading_num_layers"], workload.model.num_layers)
    if not away.any():
        return np.zeros(len(away))
    layers = Layers(c, workload, implementation, None)
    attention, dense = layers.attention().kept, layers.dense_mlp().kept
    experts = layers.experts_mlp().kept if workload.model.is_moe else dense
    kinds = _kinds(workload.model, away)
    moved = away * attention + kinds[:, DENSE] * dense + kinds[:, MOE] * experts
    travel_ms = moved / (HOST_GB_PER_S * 1e6)
    return np.maximum(travel_ms - forward_ms, 0.0) + np.maximum(travel_ms - backward_ms, 0.0)
