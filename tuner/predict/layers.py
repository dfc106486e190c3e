"""How long the GPU works on one layer and one micro-batch, for many layouts at once. Milliseconds throughout.

A matrix product costs its FLOPs at the rate that large products reach, and its bytes at the memory's: added,
since a kernel's prologue and epilogue do not hide in its main loop, so that thin shapes are slow by themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from tuner.cluster import Cluster
from tuner.errors import InputError
from tuner.flops import core_attention_macs
from tuner.predict import Implementation
from tuner.predict.collectives import Floats, Group, exchange_ms, gather_ms, group, reduce_ms, send_ms
from tuner.predict.stages import Kind
from tuner.rules.base import Columns
from tuner.workload import Precision, Workload

GEMM_EFFICIENCY: Final = 0.75
"""Share of the dense peak that a large matrix product reaches: cuBLAS on A100 to B200 gives 0.7 to 0.8."""
ATTENTION_EFFICIENCY: Final = 0.5
"""The same of fused attention: FlashAttention-2 gives 0.5 to 0.6 on A100, -3 up to 0.75 on H100."""
MEMORY_EFFICIENCY: Final = 0.8
"""Share of the memory's rate that element-wise kernels reach: copies give 0.8 to 0.9."""
TILE_ROWS: Final = 128
"""Rows of an output tile of cuBLAS: the last tile of each expert is half empty on average."""
KERNEL_MS: Final = 3e-3
"""Ramp and tail of one kernel, in which the GPU is not full."""
LAYER_KERNELS: Final = 25
"""Kernels of a dense layer's forward pass; a layer of experts has twice as many."""
NORM_PASSES: Final = 4
"""Reads and writes of the hidden state by a layer's two norms, forward."""
RESIDUAL_PASSES: Final = 6
"""Those of its two bias-dropout-adds: state and residual in, sum out."""
PERMUTE_PASSES: Final = 8
"""Those of a dispatched token: permute, sort by expert, and both back."""
SCORE_PASSES: Final = 5
"""Those of the score matrix in unfused attention: product, softmax, dropout, product; less what caches hold."""
LOSS_BYTES: Final[Mapping[Implementation, float]] = {"transformer_engine": 24.0, "torch": 60.0}
"""Bytes moved for one logit by the cross entropy, forward and backward: fused, and one operation at a time."""
USERBUFFERS_HIDE: Final = 0.7
"""Share of a tensor-parallel collective that Transformer Engine's overlap hides beside its product."""
BESIDE_PRODUCTS: Final = 0.5
"""Share of a collective that a product beside it hides otherwise: both want the same multiprocessors."""
EXPERT_OVERLAP: Final = 0.8
"""Share of a layer's products beside which the tokens of another micro-batch can travel."""

OPERAND_BYTES: Final[Mapping[Precision, float]] = {
    **{"fp32": 4.0, "bf16": 2.0, "fp16": 2.0},
    **{"fp8": 1.0, "mxfp8": 1.0, "nvfp4": 0.5},
}
"""Of one element that a matrix product reads."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Where the GPU's time goes in a pass through a module or a layer; a scalar stands for all rows."""

    gemm_ms: Floats | float = 0.0
    attention_ms: Floats | float = 0.0
    elementwise_ms: Floats | float = 0.0
    tp_ms: Floats | float = 0.0
    cp_ms: Floats | float = 0.0
    ep_ms: Floats | float = 0.0

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: Floats | float) -> "Pass":
        """Every part of it, `factor` times."""
        return Pass(*(getattr(self, f.name) * factor for f in fields(self)))

    @property
    def total(self) -> Floats | float:
        """All parts together."""
        parts: Floats | float = sum(getattr(self, f.name) for f in fields(self))
        return parts


@dataclass(frozen=True, slots=True)
class Module:
    """A module's two passes."""

    forward: Pass
    backward: Pass

    def __add__(self, other: "Module") -> "Module":
        return Module(self.forward + other.forward, self.backward + other.backward)


class Layers:
    """The parts of a workload's model under every layout of some columns.

    Raises:
        InputError: if the cluster states no peak for the workload's precision.
    """

    def __init__(
        self, workload: Workload, cluster: Cluster, c: Columns, implementation: Implementation
    ) -> None:
        self._model, self._workload, self._cluster, self._c = workload.model, workload, cluster, c
        self._implementation: Implementation = implementation
        peak = cluster.gpu.peak_tflops.get(workload.precision)
        if peak is None:
            raise InputError(
                f"cluster '{cluster.name}': key 'gpu.peak_tflops' states none for {workload.precision}; "
                f"add it, or choose a precision of {', '.join(cluster.gpu.peak_tflops)}"
            )
        self._flops_per_ms = peak * 1e9
        self.bytes_per_ms = MEMORY_EFFICIENCY * cluster.gpu.memory_bandwidth_gb_per_s * 1e6
        self._operand_bytes = OPERAND_BYTES[workload.precision]
        self.hidden_size = workload.model.hidden_size
        self.state_bytes = 4.0 if workload.precision == "fp32" else 2.0
        """Of one element of an activation."""
        # Megatron adds up bf16 and fp8 gradients in fp32 (arguments.py, accumulate_allreduce_grads_in_fp32).
        self.gradient_bytes = 2.0 if workload.precision == "fp16" else 4.0
        self._tp, self._cp, self._ep, self._etp = (c[name] for name in ("tp", "cp", "ep", "etp"))
        self.tokens = c["micro_batch_size"] * workload.seq_length / self._cp
        """Tokens of a micro-batch on one context rank."""
        self._spread = np.where(c.on("sp"), self._tp, 1)
        self._tp_group = group(self._tp, np.ones_like(self._tp), cluster)

    def modules(self, kind: Kind) -> dict[str, Module]:
        """One layer's modules, by the names that selective recompute gives them, and the rest of it."""
        hidden = self._model.hidden_size
        rows = self.tokens / self._spread * hidden
        kernels = KERNEL_MS * LAYER_KERNELS * (2 if kind.moe else 1)
        parts = {
            "layernorm": self._elementwise(NORM_PASSES * rows),
            "residual": self._elementwise(RESIDUAL_PASSES * rows, kernels),
            "core_attn": self._core_attention(kind),
        }
        if self._model.multi_latent_attention:
            parts |= self._latent_projections()
        else:
            model = self._model
            query_key_value = model.kv_channels * (model.num_attention_heads + 2 * model.num_query_groups)
            width = model.kv_channels * model.num_attention_heads
            parts["projections"] = self._between_tp(
                self._gemm(self.tokens, query_key_value / self._tp, hidden)
                + self._gemm(self.tokens, hidden, width / self._tp)
            )
        if kind.moe:
            return parts | self._experts()
        width = self._model.ffn_hidden_size
        return parts | {"mlp": self._between_tp(self._mlp(self.tokens, width / self._tp))}

    def recomputed(
        self, kind: Kind, modules: Mapping[str, Module], share: Floats
    ) -> tuple[Pass, Floats | float]:
        """What backward computes again, and how much of the modules that is.

        Selected modules, or everything in `share` of the layers.
        """
        c = self._c
        full = c.among("recompute_granularity", "full") * share
        selective = c.among("recompute_granularity", "selective")
        again = Pass()
        part: Floats | float = 0.0
        for name, module in modules.items():
            named = c.recomputes(name)
            if name == "core_attn":
                named = named | c.among("recompute_modules", "none")
            if kind.moe and name in {"moe_act", "shared_experts"}:
                named = named | c.recomputes("moe")
            dropped = full + (selective & named)
            again += module.forward.times(dropped)
            part = part + dropped / len(modules)
        return again, part

    def head(self) -> Module:
        """The output layer and the cross entropy of one micro-batch."""
        width = self._model.padded_vocab_size(1) / self._tp
        loss = self.tokens * width * LOSS_BYTES[self._implementation] / 2 / self.bytes_per_ms
        product = self._gemm(self.tokens, width, self._model.hidden_size)
        return product + Module(Pass(elementwise_ms=loss), Pass(elementwise_ms=loss))

    def embedding(self) -> Module:
        """The look-up of one micro-batch: tokens in, state out, and gradients scattered back."""
        return self._elementwise(RESIDUAL_PASSES * self.tokens * self._model.hidden_size)

    # --- kinds of work

    def _gemm(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> Module:
        """rows x into @ into x out, over `matrices` weights that share the rows; backward does two such."""
        padded = rows + np.where(np.asarray(matrices) > 1, matrices * (TILE_ROWS / 2), 0.0)
        flops_ms = 2 * padded * out * into / (GEMM_EFFICIENCY * self._flops_per_ms)
        weights = matrices * out * into
        narrow = self._operand_bytes < self.state_bytes
        # A narrow operand is first read wide, and written narrow twice: as it is and transposed.
        cast = (self.state_bytes + 2 * self._operand_bytes) if narrow else 0.0
        read, written = self._operand_bytes, self.state_bytes
        forward = (read + cast) * rows * into + read * weights + written * rows * out
        data_gradient = (read + cast) * rows * out + read * weights + written * rows * into
        weight_gradient = read * rows * (into + out) + 2 * self.gradient_bytes * weights
        backward = data_gradient + weight_gradient
        return Module(
            Pass(gemm_ms=flops_ms + forward / self.bytes_per_ms),
            Pass(gemm_ms=2 * flops_ms + backward / self.bytes_per_ms),
        )

    def _elementwise(self, elements: Floats, fixed_ms: float = 0.0) -> Module:
        """Elements read or written forward; backward moves as many again for the gradient, and the inputs."""
        moved_ms = elements * self.state_bytes / self.bytes_per_ms
        return Module(
            Pass(elementwise_ms=moved_ms + fixed_ms), Pass(elementwise_ms=1.5 * moved_ms + 2 * fixed_ms)
        )

    def _between_tp(self, module: Module) -> Module:
        """A column-parallel and a row-parallel product: an all-reduce each way, or its halves under SP."""
        whole = self.tokens * self._model.hidden_size * self.state_bytes
        one_ms = np.where(self._tp > 1, reduce_ms(whole, self._tp_group, self._cluster), 0.0)
        overlap = self._c.on("tp_comm_overlap")
        forward = np.where(
            overlap, one_ms - np.minimum(USERBUFFERS_HIDE * one_ms, module.forward.gemm_ms), one_ms
        )
        # Backward, the column-parallel half runs beside the weight gradients (tensor_parallel/layers.py).
        plain = BESIDE_PRODUCTS * np.where(self._c.on("sp"), 0.5, 1.0)
        besides = np.where(overlap, USERBUFFERS_HIDE, plain) * one_ms
        backward = one_ms - np.minimum(besides, module.backward.gemm_ms / 2)
        return module + Module(Pass(tp_ms=forward), Pass(tp_ms=backward))

    # --- the modules of a layer

    def _core_attention(self, kind: Kind) -> Module:
        model, seq_length = self._model, self._workload.seq_length
        heads = model.num_attention_heads / self._tp
        macs = core_attention_macs(model, seq_length, kind.sliding) * self.tokens / self._tp
        if self._implementation == "transformer_engine":
            forward = 2 * macs / (ATTENTION_EFFICIENCY * self._flops_per_ms_of_attention)
            backward = 2.5 * forward
        else:
            # The whole square, masked or not.
            square = 4 * core_attention_macs(model, seq_length, False) * self.tokens / self._tp
            scores = SCORE_PASSES * heads * self.tokens * seq_length * self.state_bytes
            forward = square / (GEMM_EFFICIENCY * self._flops_per_ms) + scores / self.bytes_per_ms
            backward = 2 * forward
        return Module(
            Pass(attention_ms=forward, cp_ms=self._ring_ms(forward, 1)),
            Pass(attention_ms=backward, cp_ms=self._ring_ms(backward, 2)),
        )

    @property
    def _flops_per_ms_of_attention(self) -> float:
        """Attention computes in 16 bits under the narrow formats."""
        peaks = self._cluster.gpu.peak_tflops
        return (
            peaks.get("bf16", self._flops_per_ms / 1e9) * 1e9 if self.state_bytes == 2 else self._flops_per_ms
        )

    def _ring_ms(self, beside_ms: Floats, trips: int) -> Floats:
        """Keys and values around the context ranks (their gradients too, backward), beside the attention."""
        model = self._model
        if model.multi_latent_attention:
            width = model.num_attention_heads * (
                (model.qk_head_dim or 0) + (model.qk_pos_emb_head_dim or 0) + (model.v_head_dim or 0)
            )
        else:
            width = 2 * model.num_query_groups * model.kv_channels
        ring = group(self._cp, self._tp, self._cluster)
        sent = trips * self.tokens * width / self._tp * self.state_bytes
        steps = self._cp - 1
        travel = steps * send_ms(sent, ring.outer > 1, self._cluster)
        exposed: Floats = np.maximum(travel - beside_ms, 0.0) + trips * steps * KERNEL_MS
        return exposed

    def _latent_projections(self) -> dict[str, Module]:
        model = self._model
        heads, hidden = model.num_attention_heads / self._tp, model.hidden_size
        rank, latent = model.q_lora_rank, model.kv_lora_rank or 0
        position = model.qk_pos_emb_head_dim or 0
        query = heads * ((model.qk_head_dim or 0) + position)
        key_value = heads * ((model.qk_head_dim or 0) + (model.v_head_dim or 0))
        down = self._gemm(self.tokens / self._spread, (rank or 0) + latent + position, hidden)
        out = self._gemm(self.tokens, hidden, heads * (model.v_head_dim or 0))
        up = self._gemm(self.tokens, query, rank or hidden) + self._gemm(self.tokens, key_value, latent)
        return {"projections": self._between_tp(down + out), "mla_up_proj": up}

    def _mlp(self, rows: Floats, width: Floats | float, matrices: Floats | float = 1.0) -> Module:
        """Both products of an MLP and what lies between."""
        return self._mlp_products(rows, width, matrices) + self._activation(rows, width)

    def _mlp_products(self, rows: Floats, width: Floats | float, matrices: Floats | float = 1.0) -> Module:
        hidden, inner = self._model.hidden_size, width * (2 if self._model.gated_linear_unit else 1)
        return self._gemm(rows, inner, hidden, matrices) + self._gemm(rows, hidden, width, matrices)

    def _activation(self, rows: Floats, width: Floats | float) -> Module:
        return self._elementwise((3 if self._model.gated_linear_unit else 2) * rows * width)

    def _experts(self) -> dict[str, Module]:
        model = self._model
        width = (model.moe_ffn_hidden_size or 0) / self._etp
        tokens = self.tokens / self._spread
        routed = tokens * (model.moe_router_topk or 0)
        rows = routed * self._etp
        products = self._mlp_products(rows, width, (model.num_moe_experts or 0) / self._ep)
        router = self._gemm(tokens, float(model.num_moe_experts or 0), model.hidden_size)
        permute = self._elementwise(PERMUTE_PASSES * routed * model.hidden_size)
        shared_width = model.moe_shared_expert_intermediate_size
        found = {"moe_act": self._activation(rows, width)}
        beside: Floats | float = 0.0
        if shared_width:
            shared = self._between_tp(self._mlp(self.tokens, shared_width / self._tp))
            beside = np.where(self._c.on("moe_shared_expert_overlap"), shared.forward.gemm_ms, 0.0)
            found["shared_experts"] = shared
        across = self._c.on("overlap_moe_expert_parallel_comm")
        travel = self._dispatch_ms(tokens)
        products = router + products + permute

        def exposed(compute: Floats | float, hidden: Floats | float) -> Floats:
            beside_ms = np.where(across, EXPERT_OVERLAP * compute, hidden)
            return np.maximum(travel - beside_ms, 0.0)

        forward = exposed(products.forward.gemm_ms, beside)
        backward = exposed(products.backward.gemm_ms, 2 * beside)
        found["moe"] = products + Module(Pass(ep_ms=forward), Pass(ep_ms=backward))
        return found

    def _dispatch_ms(self, tokens: Floats) -> Floats:
        """Tokens to their experts and back, once."""
        model, cluster, c = self._model, self._cluster, self._c
        topk, hidden_bytes = model.moe_router_topk or 0, model.hidden_size * self.state_bytes
        experts = group(self._ep, self._etp, cluster)
        both = group(self._ep * self._etp, np.ones_like(self._ep), cluster)
        gathered = gather_ms(tokens * hidden_bytes * both.size, both, cluster)
        tensor = group(self._etp, np.ones_like(self._etp), cluster)
        spread = gather_ms(tokens * topk * hidden_bytes * self._etp, tensor, cluster)
        exchanged = self._exchange_ms(tokens * hidden_bytes, experts, topk)
        exchanged += np.where(self._etp > 1, spread, 0.0)
        once = np.where(c.among("moe_token_dispatcher_type", "allgather"), gathered, exchanged)
        return np.where(both.size > 1, 2 * once, 0.0)

    def _exchange_ms(self, sent: Floats, experts: Group, topk: int) -> Floats:
        """A copy for each expert; the flex dispatcher (DeepEP, HybridEP) sends one to each NVLink domain."""
        inside = topk * (experts.inner - 1) / experts.size
        across = topk * (experts.size - experts.inner) / experts.size
        once = (experts.outer - 1) * (1 - (1 - 1 / experts.outer) ** topk)
        flex = self._c.among("moe_token_dispatcher_type", "flex")
        inside = np.where(flex, topk * (experts.inner - 1) / experts.inner, inside)
        return exchange_ms(sent * inside, sent * np.where(flex, once, across), experts, self._cluster)
