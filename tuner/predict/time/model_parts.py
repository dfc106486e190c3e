"""The parts of a model (layers, heads, embedding): how many each pipeline rank has, and the time per micro-batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tuner.core.columns import Columns, Floats
from tuner.core.stages import stage_slots
from tuner.core.workload import Workload
from tuner.predict import graphs
from tuner.predict.implementation import Implementation
from tuner.predict.time.context import attention_step_kernels
from tuner.predict.time.layers import LayerTimes
from tuner.predict.time.passes import ModuleTime, PassTime
from tuner.predict.time.rates import Rates
from tuner.predict.time.stages import LayerKind, LayersByRank

FORWARD_LAUNCHES: Final = 80
"""Number of operations of a dense layer's forward pass that the host launches or that make a view. Measured with a
TorchDispatchMode over Megatron-Core's local layers."""
BACKWARD_LAUNCHES: Final = 115
"""Number of operations of a dense layer's backward pass. Measured like FORWARD_LAUNCHES; of the 195 operations of both
passes, 108 launch a kernel."""
EXPERTS_LAUNCHES: Final[Mapping[Implementation, tuple[float, float]]] = {
    "transformer_engine": (3.0, 0.0),
    "torch_cuda": (1.8, 0.18),
    "torch": (1.8, 0.18),
}
"""Operations that the host launches for a layer with experts, as multiples of those for a dense layer: first for the
layer with its router, permutes and dispatch, then for each local expert. The numbers for torch are counted in
Megatron's local layers, in which the experts run one after another. The numbers for Transformer Engine are chosen,
within what is plausible, to suit Megatron Bridge's published throughput of models with experts, which `python -m
tests.bench.published` compares with the predictions."""
EXPERT_BIAS_LAUNCHES: Final = 0.06
"""Operations that a bias adds per local expert, as a multiple of those of a dense layer: it is split, weighted and
added for one expert after another. Counted in Megatron-Core's experts.py (_apply_bias)."""
HEAD_LAUNCHES: Final = 0.9
"""Operations of embedding, output layer and loss together, as a multiple of those of a dense layer. Counted like
FORWARD_LAUNCHES."""
CHUNK_LAUNCHES: Final = 0.25
"""Time of the host for one pass of the pipeline's schedule over a model chunk (data, messages, bookkeeping), as a
multiple of the time to launch a dense layer. Measured with a profiler on CPU: 0.5 ms, compared with 2.9 ms for a layer,
and the launches of the messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """All layers of one kind, all heads, or the embedding: how many each rank has, and the time of a single one.

    Times are in milliseconds for one micro-batch, forward and backward together; arrays have the shape [rows].
    """

    on_rank: Floats
    """How many such layers, heads or embeddings each pipeline rank has, shape [ranks, rows] (see `LayersByRank`)."""
    in_model: Floats | int
    """How many such layers, heads or embeddings the whole model has."""
    useful: PassTime
    """Time of the GPU for a single layer, head or embedding, without recomputation."""
    recompute_ms: Floats | float
    """Time of the forward passes that the backward pass of a single layer repeats; 0 for heads and embedding."""
    host_ms: Floats
    """Time that waiting for the host's launches adds to a single layer, head or embedding."""

    @property
    def total_ms(self) -> Floats:
        """Return the time in ms of a single layer, head or embedding for one micro-batch."""
        return self.useful.total_ms + self.recompute_ms + self.host_ms


def model_parts(
    split: LayersByRank, c: Columns, workload: Workload, rates: Rates, implementation: Implementation
) -> list[ModelPart]:
    """Return all parts of the model on the pipeline ranks: heads, embeddings, and the layers of each kind."""
    layers, host = LayerTimes(workload, rates, c, implementation), _Host(c, rates)
    head, embedding = layers.head(), layers.embedding()
    parts = [
        ModelPart(
            on_rank=split.heads,
            in_model=split.heads.sum(axis=0),
            useful=head.both,
            recompute_ms=0.0,
            host_ms=host.waits_ms(head, launches=HEAD_LAUNCHES),
        ),
        ModelPart(
            on_rank=split.embeddings,
            in_model=1,
            useful=embedding.both,
            recompute_ms=0.0,
            host_ms=host.waits_ms(embedding, launches=0.0),
        ),
    ]
    full_share = _fully_recomputed_share(c, workload)
    for kind, on_rank in split.layers.items():
        modules = layers.modules(kind)
        layer = sum(modules.values(), ModuleTime())
        repeated, repeated_share = layers.recomputed(kind, modules, full_share)
        part = ModelPart(
            on_rank=on_rank,
            in_model=split.totals[kind],
            useful=layer.both,
            recompute_ms=repeated.total_ms,
            host_ms=host.waits_ms(
                layer,
                launches=_launches(kind, c, workload, implementation),
                repeated_ms=repeated.total_ms,
                repeated_share=repeated_share,
            ),
        )
        parts.append(part)
    return parts


def _launches(
    kind: LayerKind, c: Columns, workload: Workload, implementation: Implementation
) -> Floats | float:
    """Return the operations that the host launches per pass through a layer, as a multiple of those for a dense layer.

    They include the layer's share of the pipeline's schedule, and exclude the operations that a CUDA graph replays.
    """
    schedule = CHUNK_LAUNCHES * c["pp"] * c["vpp"] / workload.model.num_layers
    if not kind.moe:
        return graphs.launches(c, kind.moe, schedule + 1.0)
    per_layer, per_expert = EXPERTS_LAUNCHES[implementation]
    per_expert += EXPERT_BIAS_LAUNCHES * workload.model.add_bias_linear
    local_experts = (workload.model.num_moe_experts or 0) / c["ep"]
    return graphs.launches(c, kind.moe, schedule + per_layer + per_expert * local_experts)


def _fully_recomputed_share(c: Columns, workload: Workload) -> Floats:
    """Return the share of a middle pipeline rank's layers that full recomputation repeats; shape [rows].

    Method uniform repeats all layers; method block repeats `recompute_num_layers` of each chunk.
    """
    layers = np.maximum(stage_slots(c, workload).middle, 1)
    block_share = np.minimum(c["recompute_num_layers"] * c["vpp"] / layers, 1.0)
    return np.where(c.among("recompute_method", "block"), block_share, 1.0)


class _Host:
    """The launches of operations by the host, and the time that the GPU waits for them, under each layout."""

    def __init__(self, c: Columns, rates: Rates) -> None:
        self._rates = rates
        # Each half of a layer has an all-reduce, or two collectives under sequence parallelism. Context parallelism
        # adds the kernels of its steps.
        self._collectives = 2 * (c["tp"] > 1) * (1 + c.on("sp")) + attention_step_kernels(c)
        self._launches_passes = ~graphs.whole_iteration(c) if graphs.captures(c).any() else None
        """Mask of the layouts in which the host launches the operations of each pass; None if it does so in all
        layouts. In the others, one CUDA graph has all passes."""

    def waits_ms(
        self,
        module: ModuleTime,
        *,
        launches: Floats | float,
        repeated_ms: Floats | float = 0.0,
        repeated_share: Floats | float = 0.0,
    ) -> Floats:
        """Return the time in ms that waiting for the host adds to a module's forward and backward pass together.

        Args:
            module: The time of the module on the GPU.
            launches: Operations that the host launches for the module, as a multiple of those for a dense layer.
            repeated_ms: Time of the forward passes that the backward pass repeats.
            repeated_share: The share of the module's operations that these forward passes repeat.
        """
        launch_ms = self._rates.launch_ms
        forward_ms = launch_ms * (launches * FORWARD_LAUNCHES + self._collectives)
        backward_ms = launch_ms * (launches * BACKWARD_LAUNCHES + self._collectives)
        backward_ms = backward_ms + repeated_share * forward_ms
        if self._launches_passes is not None:
            forward_ms, backward_ms = forward_ms * self._launches_passes, backward_ms * self._launches_passes
        if self._rates.host_runs_ahead:
            # Host and GPU work at once, so only the time by which the host takes longer counts.
            forward_ms = np.maximum(forward_ms - module.forward.total_ms, 0.0)
            backward_ms = np.maximum(backward_ms - (module.backward.total_ms + repeated_ms), 0.0)
        return forward_ms + backward_ms
