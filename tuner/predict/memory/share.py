"""A rank's share of one micro-batch under many layouts: its sizes, and the bytes of norms and of recomputed modules.

The accounts in attention.py, mlp.py and head.py, which build on this share, follow the code of the modules:
Megatron-Core 0.16 (attention.py, multi_latent_attention.py, mlp.py, moe/moe_layer.py, moe/token_dispatcher.py,
moe/experts.py), Transformer Engine 2.11 (layernorm_linear.py, linear.py, grouped_linear.py, FusedAttention,
cross_entropy.py), and for plain Torch the modules of this repository's program (launchers/programs/harness/specs.py),
in which every tensor was traced. A tensor that two modules keep counts once, in the module that makes it. The
implementation `transformer_engine` has fused norms, activations, rotary positions and loss.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Bools, Columns, Floats
from tuner.core.workload import Precision, Workload
from tuner.predict.implementation import Implementation
from tuner.predict.routing import Load, load_of_busiest

LINEAR_INPUT_BYTES: Mapping[Precision, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "mxfp8": 1.0 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes per element of the input that a linear layer keeps. Published: a quantised input is kept along one of its two
directions only, with one byte of scale per block of 32 (mxfp8) or 16 (nvfp4) elements (Transformer Engine 2.11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfLayer:
    """Bytes of one micro-batch in one half of a layer (attention or MLP, with the norm in front): arrays of [rows]."""

    kept: Floats
    """Bytes kept from the forward to the backward pass."""
    dropped: Floats
    """Bytes that selective recompute drops after the forward pass and brings back during the backward pass."""
    forward: Floats
    """Bytes beyond `kept` and `dropped` at the worst moment of the forward pass."""
    backward: Floats
    """Bytes beyond `kept` and `dropped` at the worst moment of the backward pass, the incoming gradient included."""


class RankShare:
    """A rank's share of one micro-batch under many layouts. Arrays have one value per layout.

    "Elements" are counted, and all other sizes are in bytes.
    """

    def __init__(
        self, columns: Columns, workload: Workload, implementation: Implementation, imbalance: float | None
    ) -> None:
        """Compute the sizes.

        Args:
            columns: The layouts.
            workload: The workload.
            implementation: The library whose layers the job runs.
            imbalance: Load of the busiest rank's experts divided by the mean load; None takes the expected load.
        """
        self.workload = workload
        self.model = workload.model
        self.columns = columns
        self.fused = implementation == "transformer_engine"
        """Whether norms, activations, rotary positions and loss are fused."""
        tp, cp = (columns[knob].astype(np.float64) for knob in ("tp", "cp"))
        self.tp, self.cp = tp, cp
        self.ep, self.etp = (columns[knob].astype(np.float64) for knob in ("ep", "etp"))
        expected = load_of_busiest(columns, workload)
        self.load = expected if imbalance is None else Load(*(np.full_like(tp, imbalance),) * 2)
        """Load of the busiest rank's experts, divided by the mean load."""
        self.sp: Bools = columns.on("sp") & (columns["tp"] > 1)
        """Whether sequence parallelism splits the tokens between the tensor parallel regions."""
        self.seq = workload.seq_length
        self.tokens: Floats = self.seq * columns["micro_batch_size"] / cp
        """Tokens inside the tensor parallel regions."""
        self.size = float(workload.weight_bytes)
        """Bytes of one activation."""
        self.linear = LINEAR_INPUT_BYTES[workload.precision] if self.fused else self.size
        """Bytes per element of the input that a linear layer keeps."""
        self.hidden: Floats = self.tokens / np.where(self.sp, tp, 1) * self.model.hidden_size
        """Elements of a hidden state between the tensor parallel regions."""
        self.full_hidden: Floats = self.tokens * self.model.hidden_size
        """Elements of a hidden state inside the tensor parallel regions."""
        self.state: Floats = self.hidden * self.size
        """Bytes of a hidden state: the input of a layer, a checkpoint, or a gradient between stages."""
        is_rms = workload.model.normalization == "RMSNorm"
        self.keeps_norm_input = self.fused or self.size == 4 or not is_rms
        """Whether a norm keeps its input as it is; Torch's RMSNorm in 16 bits keeps an fp32 copy instead."""

    @property
    def overlaps_experts(self) -> Bools:
        """Return the rows where a layer's backward pass runs beside a layer's forward pass of the next micro-batch."""
        return self.columns.on("overlap_moe_expert_parallel_comm")

    def split(self, droppable: Iterable[tuple[str, Floats]], kept: Floats) -> tuple[Floats, Floats]:
        """Return the kept bytes, and the bytes that selective recompute drops.

        Args:
            droppable: Modules by the names that selective recompute has for them, and their bytes. A module with an
                empty name is always kept.
            kept: Further bytes, which are always kept.
        """
        dropped = np.zeros_like(self.tokens)
        for module, module_bytes in droppable:
            is_dropped = self.columns.drops(module)
            kept = kept + np.where(is_dropped, 0, module_bytes)
            dropped = dropped + np.where(is_dropped, module_bytes, 0)
        return kept, dropped

    def norm(self, elements: Floats, feeds_linear: bool = True) -> Floats:
        """Return the bytes that a norm keeps beyond its input.

        A norm keeps its output. Torch's RMSNorm also keeps its input in fp32, and the normalised input in fp32.
        """
        output = elements * (self.linear if feeds_linear else self.size)
        if self.fused or self.model.normalization == "LayerNorm":
            return output
        return output + elements * (4.0 if self.size == 4 else 8.0)

    def norm_backward(self, held: Floats) -> Floats:
        """Return the bytes that the backward pass of the norm in front of a half of a layer needs beyond `held`.

        `held` are the bytes that the half held before, of which only the input of the norm is left. Torch's RMSNorm is
        made of elementwise products: five fp32 tensors are alive at once when the gradient of its root is made.
        """
        if self.fused or self.model.normalization == "LayerNorm":
            return np.zeros_like(held)
        return (5 + 1) * 4.0 * self.hidden - held

    def norm_input(self) -> Floats:
        """Return the bytes of hidden states that the norm in front of a half of a layer keeps as its input.

        Torch's RMSNorm in 16 bits keeps an fp32 copy instead, which `norm` counts. The second norm of a sandwich counts
        here too, since it is never recomputed alone.
        """
        dropped_input = np.where(self.columns.drops("layernorm"), self.state, 0)
        kept = self.state if self.keeps_norm_input else dropped_input
        if not self.model.sandwich_layernorm:
            return kept
        return kept + self.norm_inside() + (self.state if self.keeps_norm_input else 0)

    def norm_inside(self) -> Floats:
        """Return the bytes that a norm of the hidden state keeps beyond its input and its output."""
        return self.norm(self.hidden, feeds_linear=False) - self.hidden * self.size

    def between_nodes(self) -> Floats:
        """Return the bytes of a hidden state between two nodes of a layer's schedule; 0 without `overlaps_experts`.

        Autograd alone does not keep this state, but each node is a graph of its own, which holds its input and its
        output. Counted on Megatron-Core 0.16 (pipeline_parallel/utils.py, ScheduleNode): two more states per layer,
        three with a shared expert, and none if the norms are recomputed.
        """
        return np.where(self.overlaps_experts & ~self.columns.drops("layernorm"), self.state, 0)
