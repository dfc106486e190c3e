"""A rank's share of one micro-batch under many layouts: numbers of tokens and elements, and the bytes of norms.

attention.py, mlp.py and head.py build on this share. Their counts of bytes follow the code of the modules:
Megatron-Core 0.16 (attention.py, multi_latent_attention.py, mlp.py, moe/moe_layer.py, moe/token_dispatcher.py,
moe/experts.py), Transformer Engine 2.11 (layernorm_linear.py, linear.py, grouped_linear.py, FusedAttention,
cross_entropy.py), and for plain Torch the modules of this repository's program (launchers/programs/harness/specs.py),
in which every tensor was traced. A tensor that two modules save counts once, in the module that makes it. The
implementation `transformer_engine` has fused norms, activations, rotary positions and loss. `torch_cuda` has the
modules of plain Torch, whose norms and attention are fused kernels on CUDA (PyTorch 2.9 and later, _fused_rms_norm;
transformers/cuda/attention.cu, sdp_utils.cpp and flash_attn/flash_api.cpp).
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
"""Bytes per element of the input that a linear layer saves. Published: a quantised input is saved along one of its two
directions only, with one byte of scale per block of 32 (mxfp8) or 16 (nvfp4) elements (Transformer Engine 2.11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfLayer:
    """Bytes of one micro-batch in one half of a layer (attention or MLP, with the norm in front): arrays of [rows]."""

    kept: Floats
    """Bytes saved for the backward pass."""
    dropped: Floats
    """Bytes that selective recomputation frees after the forward pass and computes again during the backward pass."""
    forward: Floats
    """Bytes beyond `kept` and `dropped` at the worst moment of the forward pass."""
    backward: Floats
    """Bytes beyond `kept` and `dropped` at the worst moment of the backward pass, including the incoming gradient."""


class RankShare:
    """The sizes of a rank's share of one micro-batch under many layouts. Arrays have one value per layout.

    Sizes are numbers of tokens, of elements, or of bytes, as stated.
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
        """Whether Transformer Engine fuses norms, activations, rotary positions and loss."""
        self.torch_on_cuda = implementation == "torch_cuda"
        """Whether plain Torch runs on CUDA."""
        self.fused_norms = implementation != "torch" or workload.model.normalization == "LayerNorm"
        """Whether a norm is one kernel, which saves its input as it is."""
        tp, cp = (columns[knob].astype(np.float64) for knob in ("tp", "cp"))
        self.tp, self.cp = tp, cp
        self.ep, self.etp = (columns[knob].astype(np.float64) for knob in ("ep", "etp"))
        expected = load_of_busiest(columns, workload)
        self.load = expected if imbalance is None else Load(*(np.full_like(tp, imbalance),) * 2)
        """Load of the busiest rank's experts, divided by the mean load of its expert parallel group."""
        self.sp: Bools = columns.on("sp") & (columns["tp"] > 1)
        """Whether sequence parallelism splits the tokens outside the tensor parallel regions."""
        self.seq = workload.seq_length
        self.tokens: Floats = self.seq * columns["micro_batch_size"] / cp
        """Number of tokens on a rank inside the tensor parallel regions."""
        self.size = float(workload.weight_bytes)
        """Bytes of one element of an activation."""
        self.linear = LINEAR_INPUT_BYTES[workload.precision] if self.fused else self.size
        """Bytes per element of the input that a linear layer saves."""
        self.hidden: Floats = self.tokens / np.where(self.sp, tp, 1) * self.model.hidden_size
        """Number of elements of a hidden state on a rank outside the tensor parallel regions."""
        self.full_hidden: Floats = self.tokens * self.model.hidden_size
        """Number of elements of a hidden state on a rank inside the tensor parallel regions."""
        self.state: Floats = self.hidden * self.size
        """Bytes of a hidden state: the input of a layer, a checkpoint, or a gradient between stages."""
        self.keeps_norm_input = self.fused_norms or self.size == 4
        """Whether a norm saves its input as it is; Torch's RMSNorm on CPU saves an fp32 copy of 16 bits instead."""

    @property
    def overlaps_experts(self) -> Bools:
        """Return a mask of the layouts with overlap_moe_expert_parallel_comm; shape [rows].

        In these, a layer's backward pass runs beside a layer's forward pass of the next micro-batch.
        """
        return self.columns.on("overlap_moe_expert_parallel_comm")

    def split(self, droppable: Iterable[tuple[str, Floats]], kept: Floats) -> tuple[Floats, Floats]:
        """Return the bytes that are saved for the backward pass, and the bytes that selective recomputation frees.

        Args:
            droppable: Modules by their names in recompute_modules, and the bytes of each. A module with an empty name
                is always saved.
            kept: Further bytes, which are always saved.
        """
        dropped = np.zeros_like(self.tokens)
        for module, module_bytes in droppable:
            is_dropped = self.columns.drops(module)
            kept = kept + np.where(is_dropped, 0, module_bytes)
            dropped = dropped + np.where(is_dropped, module_bytes, 0)
        return kept, dropped

    def norm(self, elements: Floats, feeds_linear: bool = True) -> Floats:
        """Return the bytes that a norm of `elements` elements saves in addition to its input.

        A norm saves its output, which may be quantised if it `feeds_linear`, that is, if a linear layer follows.
        Torch's RMSNorm on CPU also saves its input in fp32, and the normalised input in fp32.
        """
        output = elements * (self.linear if feeds_linear else self.size)
        if self.fused_norms:
            return output
        return output + elements * (4.0 if self.size == 4 else 8.0)

    def norm_backward(self, held: Floats) -> Floats:
        """Return the bytes beyond `held` that the backward pass of the norm in front of attention or MLP needs.

        `held` are the bytes that attention or MLP saved, of which only the input of the norm is left by then. Torch's
        RMSNorm on CPU is made of elementwise products: beside its input, five fp32 tensors exist at the same time when
        the gradient of its root is computed. For other norms the result is 0.
        """
        if self.fused_norms:
            return np.zeros_like(held)
        return (5 + 1) * 4.0 * self.hidden - held

    def norm_input(self) -> Floats:
        """Return the bytes of hidden states that the norm in front of attention or MLP saves as its input.

        Torch's RMSNorm in 16 bits saves an fp32 copy instead, which `norm` counts. With `sandwich_layernorm`, the norm
        behind attention or MLP counts here too, since it is never recomputed alone.
        """
        dropped_input = np.where(self.columns.drops("layernorm"), self.state, 0)
        kept = self.state if self.keeps_norm_input else dropped_input
        if not self.model.sandwich_layernorm:
            return kept
        return kept + self.norm_inside() + (self.state if self.keeps_norm_input else 0)

    def norm_inside(self) -> Floats:
        """Return the bytes that a norm of the hidden state saves in addition to its input and its output."""
        return self.norm(self.hidden, feeds_linear=False) - self.hidden * self.size

    def between_nodes(self) -> Floats:
        """Return the bytes of one hidden state between two nodes of a layer's schedule; 0 if no such state is saved.

        With `overlaps_experts`, Megatron runs a layer as several nodes. Each node has an autograd graph of its own,
        which holds its input and its output; in one graph for the layer, autograd would not save them. Counted on
        Megatron-Core 0.16 (pipeline_parallel/utils.py, ScheduleNode): two more states per layer, three with a shared
        expert, and none if the norms are recomputed.
        """
        return np.where(self.overlaps_experts & ~self.columns.drops("layernorm"), self.state, 0)
