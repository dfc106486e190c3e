"""The time of one layer on the GPU for one micro-batch, in milliseconds, for many layouts at once."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Columns, Floats, Texts
from tuner.core.workload import Workload
from tuner.predict.implementation import Implementation
from tuner.predict.time.attention import CAP_PASSES, core_attention, projections
from tuner.predict.time.experts import expert_modules
from tuner.predict.time.operations import Operations
from tuner.predict.time.passes import ModuleTime, PassTime
from tuner.predict.time.rates import Rates
from tuner.predict.time.stages import LayerKind

LAYER_KERNELS: Final = 25
"""Number of kernels of a dense layer's forward pass; a layer with experts has twice as many. Assumed."""
NORM_PASSES: Final = 4
"""Reads and writes of the hidden state by a layer's two norms in the forward pass. Counted: each reads and writes
once."""
RESIDUAL_PASSES: Final = 6
"""Reads and writes of the hidden state by a layer's two bias-dropout-adds in the forward pass. Counted: each reads
state and residual, and writes their sum. The look-up of an embedding is assumed to have as many."""
LOSS_BYTES: Final[Mapping[Implementation, float]] = {
    "transformer_engine": 24.0,
    "torch_cuda": 60.0,
    "torch": 60.0,
}
"""Bytes that the cross entropy moves per logit, forward and backward together. Transformer Engine has one fused kernel,
and plain Torch has one kernel per operation. Assumed from its operations."""
LOSS_REDUCTIONS: Final[Mapping[Implementation, int]] = {"transformer_engine": 1, "torch_cuda": 3, "torch": 3}
"""Number of all-reduces of the cross entropy over the ranks that share the vocabulary. Counted for torch in
Megatron-Core's tensor_parallel/cross_entropy.py: the largest logit, the true logit and the sum. Transformer Engine's
fused cross entropy has one."""

LAYER_KNOBS: Final = (
    "tp",
    "pp",
    "cp",
    "ep",
    "etp",
    "sp",
    "micro_batch_size",
    "tp_comm_overlap",
    "moe_token_dispatcher_type",
    "moe_shared_expert_overlap",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "cp_comm_type",
    "moe_flex_dispatcher_backend",
    "nccl_nvls_enable",
    "cuda_device_max_connections",
)
"""The knobs on which the time of a layer depends."""


class LayerTimes:
    """The times in ms of a model's layers, head and embedding for one micro-batch, under each of many layouts.

    Many layouts have equal values of the knobs on which these times depend (LAYER_KNOBS). The times are computed once
    per distinct combination of these knobs.
    """

    def __init__(self, workload: Workload, rates: Rates, c: Columns, implementation: Implementation) -> None:
        self._layouts = c
        distinct_layouts, self._index = _distinct(c)
        self._operations = Operations(workload, rates, distinct_layouts, implementation)

    def modules(self, kind: LayerKind) -> dict[str, ModuleTime]:
        """Return the time of each module of one layer, by module name; shape [rows].

        Modules that selective recomputation can drop have their names in recompute_modules, such as "core_attn".
        """
        return {name: module.at(self._index) for name, module in self._distinct_modules(kind).items()}

    def _distinct_modules(self, kind: LayerKind) -> dict[str, ModuleTime]:
        """Return the time of each module of one layer, by module name.

        Each time has one row per distinct combination of LAYER_KNOBS.
        """
        ops, model = self._operations, self._operations.model
        state_elements = ops.split_tokens * model.hidden_size
        kernels_ms = ops.rates.kernel_ms * LAYER_KERNELS * (2 if kind.moe else 1)
        norm_passes = NORM_PASSES * (2 if model.sandwich_layernorm else 1)
        modules = {
            "layernorm": ops.elementwise(norm_passes, state_elements),
            "residual": ops.elementwise(RESIDUAL_PASSES, state_elements, kernels_ms),
            "core_attn": core_attention(ops, kind.sliding),
            **projections(ops),
        }
        if kind.moe:
            return modules | expert_modules(ops)
        mlp = ops.mlp(ops.tokens, model.ffn_hidden_size / ops.tp)
        return modules | {"mlp": ops.with_tp_collectives(mlp)}

    def recomputed(
        self, kind: LayerKind, modules: Mapping[str, ModuleTime], full_share: Floats
    ) -> tuple[PassTime, Floats | float]:
        """Return the time of the forward passes that a layer's backward pass repeats, and their share of all modules.

        Selective recomputation repeats the modules that it drops.

        Args:
            kind: The kind of the layer.
            modules: Time of each module of the layer, by name.
            full_share: Share of the layers in which full recomputation, if it is on, repeats all modules.
        """
        c = self._layouts
        full = c.among("recompute_granularity", "full") * full_share
        repeated = PassTime()
        repeated_share: Floats | float = 0.0
        for name, module in modules.items():
            dropped = c.drops(name)
            if kind.moe and name in {"moe_act", "shared_experts"}:
                dropped = dropped | c.drops("moe")
            share = full + dropped
            repeated += module.forward.times(share)
            repeated_share = repeated_share + share / len(modules)
        return repeated, repeated_share

    def head(self) -> ModuleTime:
        """Return the time of the output layer and the cross entropy for one micro-batch."""
        ops, model = self._operations, self._operations.model
        vocabulary = model.padded_vocab_size(1) / ops.tp
        loss_bytes = LOSS_BYTES[ops.implementation] / 2
        if model.final_logit_softcapping is not None:
            loss_bytes += CAP_PASSES * ops.state_bytes
        loss_ms = ops.rates.moved_ms(ops.tokens * vocabulary * loss_bytes, loss_bytes / ops.state_bytes)
        # Each rank has a part of the vocabulary, and each all-reduce takes one fp32 number per token.
        reduced_ms = LOSS_REDUCTIONS[ops.implementation] * ops.reduce_ms(ops.tokens * 4.0, ops.tp_group)
        reduced_ms = np.where(ops.tp > 1, reduced_ms, 0.0)
        loss = ModuleTime(
            PassTime(elementwise_ms=loss_ms, tp_ms=reduced_ms), PassTime(elementwise_ms=loss_ms)
        )
        product = ops.gemm(ops.tokens, vocabulary, model.hidden_size)
        return (product + loss + ops.column_parallel_collectives()).at(self._index)

    def embedding(self) -> ModuleTime:
        """Return the time to look up the embeddings of one micro-batch, and to add up their gradients."""
        ops = self._operations
        look_up = ops.elementwise(RESIDUAL_PASSES, ops.tokens * ops.model.hidden_size)
        reduce_ms, half_ms = ops.state_collectives_ms()
        sp = ops.layouts.on("sp")
        forward_ms, backward_ms = np.where(sp, half_ms, reduce_ms), np.where(sp, half_ms, 0.0)
        collectives = ModuleTime(PassTime(tp_ms=forward_ms), PassTime(tp_ms=backward_ms))
        return (look_up + collectives).at(self._index)


def _distinct(c: Columns) -> tuple[Columns, NDArray[np.intp]]:
    """Return the distinct combinations of LAYER_KNOBS in `c`, and the index of each row's combination among them."""
    columns = {knob: c.column(knob) for knob in LAYER_KNOBS}
    codes = [
        np.asarray(column.codes if isinstance(column, Texts) else column, dtype=np.int64)
        for column in columns.values()
    ]
    key = np.ravel_multi_index(codes, [int(code.max()) + 1 for code in codes])
    _, rows, index = np.unique(key, return_index=True, return_inverse=True)
    distinct = {
        knob: Texts(column.codes[rows], column.categories) if isinstance(column, Texts) else column[rows]
        for knob, column in columns.items()
    }
    return Columns(distinct), index
