"""How long the GPU works on one layer and one micro-batch, for many layouts at once. Milliseconds throughout."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Columns, Ints, Texts
from tuner.core.flops import core_attention_macs
from tuner.core.workload import Workload
from tuner.predict import nccl
from tuner.predict.implementation import Implementation
from tuner.predict.routing import load_of_busiest
from tuner.predict.time.collectives import FABRIC_EFFICIENCY, NVLINK_EFFICIENCY, Floats, ProcessGroups, process_groups
from tuner.predict.time.context import ContextExchange
from tuner.predict.time.rates import FLEX_EFFICIENCY, Rates
from tuner.predict.time.stages import Kind

ATTENTION_EFFICIENCY: Final = 2 / 3
"""Fused attention's rate over that of large products: of the peak, FlashAttention-2 gives 0.5 to 0.6 on A100 and -3
up to 0.75 on H100."""
LAYER_KERNELS: Final = 25
"""Kernels of a dense layer's forward pass; a layer of experts has twice as many."""
NORM_PASSES: Final = 4
"""Reads and writes of the hidden state by a layer's two norms, forward."""
RESIDUAL_PASSES: Final = 6
"""Those of its two bias-dropout-adds: state and residual in, sum out."""
PERMUTE_PASSES: Final = 8
"""Those of a dispatched token: permute, sort by expert, and both back."""
FLEX_PERMUTE_PASSES: Final = 4
"""The same where flex dispatches: one permute, of the tokens that came, and its way back (moe/token_dispatcher.py,
_DeepepManager; HybridEP does it in the same call, csrc/hybrid_ep/extension/permute.cu)."""
DEEPEP_NVLINK_RANKS: Final = 8
"""Ranks that DeepEP reaches over NVLink, whatever the domain (csrc/kernels/configs.cuh, NUM_MAX_NVL_PEERS)."""
BIAS_PASSES: Final = (14, 18)
"""Those of a dispatched token for the bias of its experts, forward and backward: multiply, add, concatenate, round."""
SCORE_PASSES: Final = 5
"""Those of the score matrix in unfused attention: product, softmax, dropout, product; less what caches hold."""
CAP_PASSES: Final = 6
"""Those of bounding scores or logits: two scalings and a tanh, each on its own."""
LOSS_BYTES: Final[Mapping[Implementation, float]] = {"transformer_engine": 24.0, "torch": 60.0}
"""Bytes moved for one logit by the cross entropy, forward and backward: fused, and one operation at a time."""
LOSS_REDUCTIONS: Final[Mapping[Implementation, int]] = {"transformer_engine": 1, "torch": 3}
"""Collectives of the cross entropy over the parts of the vocabulary."""
USERBUFFERS_HIDE: Final = 0.7
"""Share of a tensor-parallel collective that Transformer Engine's overlap hides beside its product."""
BESIDE_PRODUCTS: Final = 0.5
"""Share of a collective that a product beside it hides otherwise: both want the same multiprocessors."""
EXPERT_OVERLAP: Final = 0.8
"""Share of a layer's products beside which the tokens of another micro-batch can travel."""
DELAYED_OVERLAP: Final = 0.9
"""The same backward with delayed weight gradients, half of its products: they go where nothing else is left to go
beside, so that half of what was lost is won (model_chunk_schedule_plan.py). No figure is published."""
OUT_OF_ORDER: Final = 0.5
"""Share of an overlap that is left where the hardware queues are not as it wants them: kernels then start in another
order, now and then. No figure is published; Megatron-LM's arguments.py refuses the combination."""


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

    def at(self, rows: NDArray[np.intp]) -> "Pass":
        """Every part of it at some rows."""
        parts = (getattr(self, f.name) for f in fields(self))
        return Pass(*(part[rows] if isinstance(part, np.ndarray) else part for part in parts))

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


SHAPING: Final = (
    *(
        "tp",
        "pp",
        "cp",
        "ep",
        "etp",
        "sp",
        "micro_batch_size",
        "tp_comm_overlap",
        "moe_token_dispatcher_type",
    ),
    *("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute"),
    *("cp_comm_type", "moe_flex_dispatcher_backend", "nccl_nvls_enable", "cuda_device_max_connections"),
)
"""The knobs that what a layer takes depends on."""


def _distinct(c: Columns) -> tuple[Columns, NDArray[np.intp]]:
    """The layouts that differ in these knobs, and which of them each row is: they are few, and a layer costs a lot."""
    columns = {knob: c.column(knob) for knob in SHAPING}
    codes = [np.asarray(v.codes if isinstance(v, Texts) else v, dtype=np.int64) for v in columns.values()]
    key = np.ravel_multi_index(codes, [int(code.max()) + 1 for code in codes])
    _, rows, kind_of = np.unique(key, return_index=True, return_inverse=True)
    few = {
        knob: Texts(column.codes[rows], column.categories) if isinstance(column, Texts) else column[rows]
        for knob, column in columns.items()
    }
    return Columns(few), kind_of


class Layers:
    """The parts of a workload's model under every layout of some columns."""

    def __init__(self, workload: Workload, rates: Rates, c: Columns, implementation: Implementation) -> None:
        self._model, self._workload, self._rates = workload.model, workload, rates
        self._layouts = c
        c, self._kind_of = _distinct(c)
        self._c = c
        self._implementation: Implementation = implementation
        self.state_bytes = rates.state_bytes
        self._tp, self._cp, self._ep, self._etp = (c[name] for name in ("tp", "cp", "ep", "etp"))
        self.tokens = c["micro_batch_size"] * workload.seq_length / self._cp
        """Tokens of a micro-batch on one context rank."""
        self._spread = np.where(c.on("sp"), self._tp, 1)
        self._tp_group = self._group(self._tp)
        self._hides = float(rates.host_runs_ahead)
        """1 where communication can run beside computation."""
        queues = c["cuda_device_max_connections"]
        # Blackwell's queues keep the order by themselves (Megatron Bridge: scripts/performance/utils/overrides.py).
        blackwell = "nvfp4" in rates.cluster.gpu.peak_tflops
        self._in_order = np.where((queues > 1) & np.bool_(not blackwell), OUT_OF_ORDER, 1.0)
        self._apart = np.where(queues == 1, OUT_OF_ORDER, 1.0)
        """Shares of an overlap left: where one queue keeps the order of launches, and where several let streams go."""

    def _group(self, size: Ints, stride: Ints | None = None) -> ProcessGroups:
        return process_groups(size, np.ones_like(size) if stride is None else stride, self._rates.cluster)

    def modules(self, kind: Kind) -> dict[str, Module]:
        """One layer's modules, by the names that selective recompute gives them, and the rest of it."""
        return {name: self._of_layouts(module) for name, module in self._modules(kind).items()}

    def _of_layouts(self, module: Module) -> Module:
        """What was found for distinct layouts, for every layout."""
        return Module(module.forward.at(self._kind_of), module.backward.at(self._kind_of))

    def _modules(self, kind: Kind) -> dict[str, Module]:
        """The same of the distinct layouts."""
        hidden = self._model.hidden_size
        rows = self.tokens / self._spread * hidden
        kernels = self._rates.kernel_ms * LAYER_KERNELS * (2 if kind.moe else 1)
        parts = {
            "layernorm": self._elementwise(NORM_PASSES * (2 if self._model.sandwich_layernorm else 1), rows),
            "residual": self._elementwise(RESIDUAL_PASSES, rows, kernels),
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
        c = self._layouts
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
        loss_bytes = LOSS_BYTES[self._implementation] / 2
        if self._model.final_logit_softcapping is not None:
            loss_bytes += CAP_PASSES * self.state_bytes
        loss_ms = self._rates.moved_ms(self.tokens * width * loss_bytes, loss_bytes / self.state_bytes)
        # Each rank has a part of the vocabulary: the largest logit, the right one and the sum of all are reduced.
        reductions = LOSS_REDUCTIONS[self._implementation]
        reduced_ms = reductions * self._reduce_ms(self.tokens * 4.0, self._tp_group)
        reduced_ms = np.where(self._tp > 1, reduced_ms, 0.0)
        loss = Module(Pass(elementwise_ms=loss_ms, tp_ms=reduced_ms), Pass(elementwise_ms=loss_ms))
        product = self._gemm(self.tokens, width, self._model.hidden_size)
        return self._of_layouts(product + loss + self._column_parallel())

    def embedding(self) -> Module:
        """The look-up of one micro-batch: tokens in, state out, and gradients scattered back."""
        looked_up = self._elementwise(RESIDUAL_PASSES, self.tokens * self._model.hidden_size)
        whole_ms, half_ms = self._across_tp()
        sp = self._c.on("sp")
        forward, backward = np.where(sp, half_ms, whole_ms), np.where(sp, half_ms, 0.0)
        return self._of_layouts(looked_up + Module(Pass(tp_ms=forward), Pass(tp_ms=backward)))

    def _across_tp(self) -> tuple[Floats, Floats]:
        """An all-reduce of a micro-batch's state, and what under SP is half of it; nothing on a lone rank."""
        rates, ranks = self._rates, self._tp_group
        whole = self.tokens * self._model.hidden_size * self.state_bytes
        halves = rates.gather_ms(whole, ranks) + rates.gather_ms(whole, ranks, "reduce_scatter")
        several = self._tp > 1
        return np.where(several, self._reduce_ms(whole, ranks), 0.0), np.where(several, halves / 2, 0.0)

    def _reduce_ms(self, whole_bytes: Floats, ranks: ProcessGroups) -> Floats:
        """An all-reduce, in NVLink's switches where they can."""
        factor = nccl.all_reduce_factor(
            self._c, ranks, self._rates.cluster, self._rates.measured("all_reduce")
        )
        return self._rates.reduce_ms(whole_bytes, ranks) * factor

    def _column_parallel(self) -> Module:
        """What a column-parallel product alone sends: backward a reduction, under SP the state, twice, as well."""
        whole_ms, half_ms = self._across_tp()
        sp = self._c.on("sp")
        return Module(Pass(tp_ms=np.where(sp, half_ms, 0.0)), Pass(tp_ms=np.where(sp, 2 * half_ms, whole_ms)))

    # --- kinds of work

    def _gemm(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> Module:
        """A product and the two of its backward pass, as `Rates.product_ms`."""
        forward, backward = self._rates.product_ms(rows, out, into, matrices)
        return Module(Pass(gemm_ms=forward), Pass(gemm_ms=backward))

    def _elementwise(self, passes: float, elements: Floats, fixed_ms: float = 0.0) -> Module:
        """Elements read or written so often forward; backward as many again for the gradient, and the inputs."""
        moved_ms = self._rates.moved_ms(passes * elements * self.state_bytes, passes / 2)
        return Module(
            Pass(elementwise_ms=moved_ms + fixed_ms), Pass(elementwise_ms=1.5 * moved_ms + 2 * fixed_ms)
        )

    def _between_tp(self, module: Module) -> Module:
        """A column-parallel and a row-parallel product: an all-reduce each way, or its halves under SP."""
        whole_ms, half_ms = self._across_tp()
        one_ms = np.where(self._c.on("sp"), 2 * half_ms, whole_ms)
        overlap = self._c.on("tp_comm_overlap")
        forward = np.where(
            overlap, one_ms - np.minimum(USERBUFFERS_HIDE * one_ms, module.forward.gemm_ms), one_ms
        )
        # Backward, the column-parallel half runs beside the weight gradients (tensor_parallel/layers.py); under SP
        # its input is gathered again, beside the data gradient.
        again = np.where(self._c.on("sp"), half_ms, 0.0)
        plain = self._in_order * BESIDE_PRODUCTS * np.where(self._c.on("sp"), half_ms + again, one_ms)
        besides = np.where(overlap, USERBUFFERS_HIDE * (one_ms + again), plain)
        backward = one_ms + again - self._hides * np.minimum(besides, module.backward.gemm_ms / 2)
        return module + Module(Pass(tp_ms=forward), Pass(tp_ms=backward))

    # --- the modules of a layer

    def _core_attention(self, kind: Kind) -> Module:
        model, seq_length = self._model, self._workload.seq_length
        heads = model.num_attention_heads / self._tp
        macs = core_attention_macs(model, seq_length, kind.sliding) * self.tokens / self._tp
        capped = model.attn_logit_softcapping is not None
        if self._implementation == "transformer_engine" and not capped:
            forward = self._rates.attention_ms(2 * macs, ATTENTION_EFFICIENCY)
            backward = 2.5 * forward
        else:
            # The whole square, masked or not.
            square = 4 * core_attention_macs(model, seq_length, False) * self.tokens / self._tp
            passes = SCORE_PASSES + (CAP_PASSES if capped else 0)
            scores = passes * heads * self.tokens * seq_length * self.state_bytes
            forward = self._rates.attention_ms(square, 1.0) + self._rates.moved_ms(scores, passes / 2)
            backward = 2 * forward
        ranks = ContextExchange(model, self._rates, self._c, self.tokens)
        gathers = self._implementation == "torch"
        travel, back = ranks.gathered_ms(gathers_again=False) if gathers else ranks.exposed_ms(forward, backward)
        return Module(
            Pass(attention_ms=forward, cp_ms=np.where(self._cp > 1, travel, 0.0)),
            Pass(attention_ms=backward, cp_ms=np.where(self._cp > 1, back, 0.0)),
        )

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
        return self._elementwise(3 if self._model.gated_linear_unit else 2, rows * width)

    def _experts(self) -> dict[str, Module]:
        model = self._model
        width = (model.moe_ffn_hidden_size or 0) / self._etp
        tokens = self.tokens / self._spread
        busiest = self._busiest()
        routed = tokens * (model.moe_router_topk or 0) * busiest
        rows = routed * self._etp
        products = self._mlp_products(rows, width, (model.num_moe_experts or 0) / self._ep)
        router = self._router(tokens)
        permute = self._permute(routed * model.hidden_size)
        shared_width = model.moe_shared_expert_intermediate_size
        found = {"moe_act": self._activation(rows, width)}
        if model.add_bias_linear:
            products = products + self._weighed_bias(routed)
        beside: Floats | float = 0.0
        if shared_width:
            shared = self._between_tp(self._mlp(self.tokens, shared_width / self._tp))
            beside = np.where(self._c.on("moe_shared_expert_overlap"), shared.forward.gemm_ms, 0.0)
            found["shared_experts"] = shared
        across = self._c.on("overlap_moe_expert_parallel_comm")
        travel = self._dispatch_ms(tokens * busiest)
        products = router + products + permute

        def exposed(compute: Floats | float, hidden: Floats | float, notices: Floats) -> Floats:
            beside_ms = self._hides * self._apart * np.where(across, compute, hidden)
            return np.maximum(travel + notices - beside_ms, 0.0)

        counts, weights = self._notices_ms()
        delayed = np.where(self._c.on("delay_wgrad_compute"), DELAYED_OVERLAP, EXPERT_OVERLAP)
        forward = exposed(EXPERT_OVERLAP * products.forward.gemm_ms, beside, counts + weights)
        backward = exposed(delayed * products.backward.gemm_ms, 2 * beside, weights)
        found["moe"] = products + Module(Pass(ep_ms=forward), Pass(ep_ms=backward))
        return found

    def _permute(self, elements: Floats) -> Module:
        """Tokens into the order of the experts and back."""
        plain, flex = self._elementwise(PERMUTE_PASSES, elements), self._flexible
        if not flex.any():
            return plain
        share = np.where(flex, FLEX_PERMUTE_PASSES / PERMUTE_PASSES, 1.0)
        return Module(plain.forward.times(share), plain.backward.times(share))

    @property
    def _flexible(self) -> NDArray[np.bool_]:
        return self._c.among("moe_token_dispatcher_type", "flex")

    def _busiest(self) -> Floats:
        """Tokens of the rank that a layer's others wait for, over the mean; on shared cores the others work on."""
        load = load_of_busiest(self._c, self._workload)
        layers = np.maximum(sum(self._model.moe_layer_pattern()) / self._c["pp"], 1)
        one: Floats = np.minimum(1 + (load.kept - 1) * np.sqrt(layers), load.worst)
        return one if self._rates.ranks_per_core == 1 else np.ones_like(one)

    def _router(self, tokens: Floats) -> Module:
        """Scores of every expert in fp32, in which the state is first written."""
        flops = 2 * tokens * self._model.hidden_size * (self._model.num_moe_experts or 0)
        once_ms, cast = self._rates.fp32_ms(flops), self._elementwise(3, tokens * self._model.hidden_size)
        return cast + Module(Pass(gemm_ms=once_ms), Pass(gemm_ms=2 * once_ms))

    def _weighed_bias(self, routed: Floats) -> Module:
        """The bias behind the experts, times the tokens' weights and so in fp32 (experts.py, _apply_bias)."""
        moved = routed * self._model.hidden_size * self.state_bytes
        forward, backward = (self._rates.moved_ms(passes * moved) for passes in BIAS_PASSES)
        return Module(Pass(elementwise_ms=forward), Pass(elementwise_ms=backward))

    def _notices_ms(self) -> tuple[Floats, Floats]:
        """What alltoall sends beside the tokens, next to nothing each: how many go where, and their weights."""
        experts, nothing = self._group(self._ep, self._etp), np.zeros(self._ep.shape)
        needed = (self._ep > 1) & self._c.among("moe_token_dispatcher_type", "alltoall")
        counts = self._rates.gather_ms(nothing, self._group(self._ep * self._etp))
        weights = self._rates.exchange_ms(nothing, nothing, experts)
        return np.where(needed, counts, 0.0), np.where(needed, weights, 0.0)

    def _dispatch_ms(self, tokens: Floats) -> Floats:
        """Tokens to their experts and back, once."""
        model, c, rates = self._model, self._c, self._rates
        topk, hidden_bytes = model.moe_router_topk or 0, model.hidden_size * self.state_bytes
        experts, both = self._group(self._ep, self._etp), self._group(self._ep * self._etp)
        tensor = self._group(self._etp)

        def both_ways(whole: Floats, ranks: ProcessGroups) -> Floats:
            return rates.gather_ms(whole, ranks) + rates.gather_ms(whole, ranks, "reduce_scatter")

        gathered = both_ways(tokens * hidden_bytes * both.size, both)
        spread = both_ways(tokens * topk * hidden_bytes * self._etp, tensor)
        exchanged = 2 * self._exchange_ms(tokens * hidden_bytes, experts, topk)
        exchanged = np.where(self._ep > 1, exchanged, 0.0) + np.where(self._etp > 1, spread, 0.0)
        once = np.where(c.among("moe_token_dispatcher_type", "allgather"), gathered, exchanged)
        return np.where(both.size > 1, once, 0.0)

    def _exchange_ms(self, sent: Floats, experts: ProcessGroups, topk: int) -> Floats:
        """A copy for each expert; the flex dispatcher (DeepEP, HybridEP) sends one to each rank, of which those in
        another NVLink domain share theirs on the way."""
        flex = self._flexible
        deepep = flex & self._c.among("moe_flex_dispatcher_backend", "deepep")
        near = np.where(deepep, np.minimum(experts.ranks_per_domain, DEEPEP_NVLINK_RANKS), experts.ranks_per_domain)
        experts = ProcessGroups(experts.size, experts.stride, near)
        ranks = (experts.size - 1) * (1 - (1 - 1 / experts.size) ** topk)
        domains = (experts.domains - 1) * (1 - (1 - 1 / experts.domains) ** topk)
        ranks = ranks * NVLINK_EFFICIENCY / FLEX_EFFICIENCY
        domains = domains * FABRIC_EFFICIENCY / FLEX_EFFICIENCY
        inside = np.where(flex, ranks, topk * (experts.ranks_per_domain - 1) / experts.size)
        across = np.where(flex, domains, topk * (experts.size - experts.ranks_per_domain) / experts.size)
        return self._rates.exchange_ms(sent * inside, sent * across, experts)
