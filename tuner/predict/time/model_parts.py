"""The parts of a model that pipeline ranks hold, with the time that each takes for one micro-batch."""

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
"""Operations of a dense layer's forward pass that the host launches or that make a view. Measured with a
TorchDispatchMode over Megatron-Core's local layers."""
BACKWARD_LAUNCHES: Final = 115
"""Operations of a dense layer's backward pass. Measured like FORWARD_LAUNCHES; of the 195 operations of both passes,
108 are launches."""
EXPERTS_LAUNCHES: Final[Mapping[Implementation, tuple[float, float]]] = {
    "transformer_engine": (3.0, 0.0),
    "torch": (1.8, 0.18),
}
"""Operations that the host launches for a layer of experts, as multiples of a dense layer's: first for the layer
with its router, permutes and dispatch, then for each local expert. The numbers for torch are counted in Megatron's
local layers, where the experts run one after another. The numbers for Transformer Engine are chosen, within what is
plausible, to suit Megatron Bridge's published throughput of mixtures, which `python -m tests.bench.published` compares
with the predictions."""
EXPERT_BIAS_LAUNCHES: Final = 0.06
"""Operations that a bias adds per local expert, as a multiple of a dense layer's: it is split, weighted and added for
one expert after another. Counted in Megatron-Core's experts.py (_apply_bias)."""
HEAD_LAUNCHES: Final = 0.9
"""Operations of embedding, output layer and loss together, as a multiple of a dense layer's. Counted like
FORWARD_LAUNCHES."""
CHUNK_LAUNCHES: Final = 0.25
"""Work of the host for one pass of the pipeline's schedule over a model chunk (data, messages, bookkeeping), as a
multiple of a dense layer's. Measured with a profiler on CPU: 0.5 ms, next to 2.9 ms for a layer, and the launches of
the messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """All layers of one kind, all heads, or the embedding: where they lie, and how long one takes for a micro-batch.

    Times are in milliseconds and count the forward and the backward pass; arrays have the shape [rows].
    """

    on_rank: Floats
    """How many such parts each pipeline rank holds, shape [ranks, rows] (see `LayersByRank`)."""
    in_model: Floats | int
    """How many such parts the whole model has."""
    useful: PassTime
    """The GPU's time for one such part, without recompute."""
    recompute_ms: Floats | float
    """Time of the forward passes that the backward pass repeats."""
    host_ms: Floats
    """Time that waiting for the host adds."""

    @property
    def total_ms(self) -> Floats:
        """Return the time of one such part for one micro-batch."""
        return self.useful.total_ms + self.recompute_ms + self.host_ms


def model_parts(
    split: LayersByRank, c: Columns, workload: Workload, rates: Rates, implementation: Implementation
) -> list[ModelPart]:
    """Return all that the pipeline ranks hold: heads, embeddings, and the layers of each kind."""
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
    """Return the operations that the host launches for a pass through a layer, as a multiple of a dense layer's.

    They include the layer's share of the pipeline's schedule, and exclude what a CUDA graph replays.
    """
    schedule = CHUNK_LAUNCHES * c["pp"] * c["vpp"] / workload.model.num_layers
    if not kind.moe:
        return graphs.launches(c, kind.moe, schedule + 1.0)
    per_layer, per_expert = EXPERTS_LAUNCHES[implementation]
    per_expert += EXPERT_BIAS_LAUNCHES * workload.model.add_bias_linear
    local_experts = (workload.model.num_moe_experts or 0) / c["ep"]
    return graphs.launches(c, kind.moe, schedule + per_layer + per_expert * local_experts)


def _fully_recomputed_share(c: Columns, workload: Workload) -> Floats:
    """Return the share of a middle rank's layers that full recompute repeats.

    Method uniform repeats all layers; method block repeats `recompute_num_layers` of each chunk.
    """
    layers = np.maximum(stage_slots(c, workload).middle, 1)
    block_share = np.minimum(c["recompute_num_layers"] * c["vpp"] / layers, 1.0)
    return np.where(c.among("recompute_method", "block"), block_share, 1.0)


class _Host:
    """The host that launches the operations of each layout's ranks."""

    def __init__(self, c: Columns, rates: Rates) -> None:
        self._rates = rates
        # Each half of a layer has an all-reduce, or two collectives under sequence parallelism. Context parallelism
        # adds the kernels of its steps.
        self._collectives = 2 * (c["tp"] > 1) * (1 + c.on("sp")) + attention_step_kernels(c)
        self._launches_passes = ~graphs.whole_iteration(c) if graphs.captures(c).any() else None
        """Rows in which the host launches the passes itself; None if it does in every row."""

    def waits_ms(
        self,
        module: ModuleTime,
        *,
        launches: Floats | float,
        repeated_ms: Floats | float = 0.0,
        repeated_share: Floats | float = 0.0,
    ) -> Floats:
        """Return the time that waiting for the host adds to a module's two passes.

        Args:
            module: The module.
            launches: Operations that the host launches for it, as a multiple of a dense layer's.
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
