"""Activations in host memory: the layers that the GPU no longer holds, and the time of transfers that nothing hides.

While later layers run forward, Transformer Engine copies the saved activations of the first `cpu_offloading_num_layers`
layers to the host, spread evenly over the forward pass. It copies them back before the backward pass of these layers
(transformer_engine/pytorch/cpu_offload.py, AsyncDoubleBufferGroupOffloadHandler). Megatron allows this only without a
pipeline and without recomputation.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.workload import Model, Workload
from tuner.predict.implementation import Implementation
from tuner.predict.memory.attention import attention
from tuner.predict.memory.mlp import dense_mlp, experts_mlp
from tuner.predict.memory.share import RankShare
from tuner.predict.memory.stages import DENSE, MOE, StagesInFlight

HOST_GB_PER_S: Final = 50.0
"""Rate between a GPU and its host, in one direction. Assumed: 0.8 of the published 64 GB/s of PCIe 5.0 x16 (NVIDIA's
data sheet of the H100: 128 GB/s for both directions). An A100 has half of this rate, a Grace host much more."""


def keep_on_device(stages: StagesInFlight, c: Columns, model: Model) -> StagesInFlight:
    """Return `stages` without the offloaded layers in its counts of layers in flight.

    One of the offloaded layers still counts, since one is always being copied.
    """
    offloaded = c["cpu_offloading_num_layers"][stages.row]
    if not offloaded.any():
        return stages
    removed = _by_kind(model, np.maximum(np.minimum(offloaded, model.num_layers) - 1, 0))

    def on_device(kept: Floats) -> Floats:
        kept = kept.copy()
        kept[:, DENSE] = np.maximum(kept[:, DENSE] - removed[:, DENSE], 0)
        kept[:, MOE] = np.maximum(kept[:, MOE] - removed[:, MOE], 0)
        return kept

    # Without a pipeline, the loss is computed when all layers are in flight.
    in_flight = on_device(stages.in_flight)
    return replace(stages, in_flight=in_flight, at_loss=in_flight, first_chunk=on_device(stages.first_chunk))


def _by_kind(model: Model, first: Ints) -> Ints:
    """Return how many of the first `first` layers of the model are dense and how many have experts; shape [rows, 2]."""
    moe = np.concatenate([[0], np.cumsum(model.moe_layer_pattern())])[first]
    return np.stack([first - moe, moe], axis=1)


def exposed_ms(
    c: Columns, workload: Workload, implementation: Implementation, forward_ms: Floats, backward_ms: Floats
) -> Floats:
    """Return the time in ms of those transfers of one micro-batch that its passes do not hide; shape [rows].

    `forward_ms` and `backward_ms` are the times of the forward and the backward pass of one micro-batch.
    """
    offloaded = np.minimum(c["cpu_offloading_num_layers"], workload.model.num_layers)
    if not offloaded.any():
        return np.zeros(len(offloaded))
    share = RankShare(c, workload, implementation, None)
    dense = dense_mlp(share).kept
    experts = experts_mlp(share).kept if workload.model.is_moe else dense
    layers = _by_kind(workload.model, offloaded)
    moved_bytes = offloaded * attention(share).kept + layers[:, DENSE] * dense + layers[:, MOE] * experts
    travel_ms = moved_bytes / (HOST_GB_PER_S * 1e6)
    return np.maximum(travel_ms - forward_ms, 0.0) + np.maximum(travel_ms - backward_ms, 0.0)
