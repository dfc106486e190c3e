"""What autograd keeps of one layer and one micro-batch, and what its passes need beside that, in bytes a rank.

The lists follow the modules' own code: Megatron-Core 0.16 (attention.py, multi_latent_attention.py, mlp.py,
moe/moe_layer.py, moe/token_dispatcher.py, moe/experts.py), Transformer Engine 2.11 (layernorm_linear.py, linear.py,
grouped_linear.py, FusedAttention, cross_entropy.py), and for plain Torch the modules of this repository's program
(launchers/programs/harness/specs.py), whose every tensor was traced. A tensor that two modules keep counts
once, where it is made. `transformer_engine` stands for fused norms, activations, rotary positions and loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Bools, Columns
from tuner.core.parameters import attention, expert
from tuner.core.workload import Model, Precision, Workload
from tuner.predict.implementation import Implementation
from tuner.predict.routing import Load, load_of_busiest

Floats = NDArray[np.float64]
LINEAR_INPUT_BYTES: Mapping[Precision, float] = {
    **{"fp32": 4.0, "bf16": 2.0, "fp16": 2.0},
    **{"fp8": 1.0, "mxfp8": 1.0 + 1 / 32, "nvfp4": 0.5 + 1 / 16},
}
"""Bytes an element of a linear layer's kept input; quantised ones with their block scales, one direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One half of a layer: attention or MLP, each with the norm in front of it. Bytes of one micro-batch."""

    kept: Floats
    """From its forward to its backward pass."""
    dropped: Floats
    """Kept as well without selective recompute; comes back during its backward pass."""
    forward: Floats
    """Beyond both, at the worst moment of its forward pass."""
    backward: Floats
    """Beyond both, at the worst moment of its backward pass, the incoming gradient among it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Final norm, output layer and loss. Bytes of one micro-batch."""

    kept: Floats
    norm: Floats
    """Of it, what the final norm keeps."""
    backward: Floats


class Layers:
    """The layers of a workload under many layouts: sizes of a rank's share, as arrays of one value a layout."""

    def __init__(
        self, columns: Columns, workload: Workload, implementation: Implementation, imbalance: float | None
    ) -> None:
        self.model: Model = workload.model
        self.columns = columns
        self.fused = implementation == "transformer_engine"
        tp, cp, ep = (columns[knob].astype(np.float64) for knob in ("tp", "cp", "ep"))
        self.tp, self.cp, self.ep = tp, cp, ep
        expected = load_of_busiest(columns, workload)
        self.load = expected if imbalance is None else Load(*(np.full_like(tp, imbalance),) * 2)
        self.etp = columns["etp"].astype(np.float64)
        self.sp: Bools = columns.on("sp") & (columns["tp"] > 1)
        self.seq = workload.seq_length
        self.tokens = self.seq * columns["micro_batch_size"] / cp
        self.size = 4.0 if workload.precision == "fp32" else 2.0
        """Bytes of an activation."""
        self.linear = LINEAR_INPUT_BYTES[workload.precision] if self.fused else self.size
        self.hidden = self.tokens / np.where(self.sp, tp, 1) * self.model.hidden_size
        """Elements of a hidden state between the tensor parallel regions."""
        self.full_hidden = self.tokens * self.model.hidden_size
        self.state = self.hidden * self.size
        """Bytes of a hidden state: a layer's input, a checkpoint, a gradient between stages."""
        rms = workload.model.normalization == "RMSNorm"
        self._keeps_norm_input = self.fused or self.size == 4 or not rms

    def _recomputed(self, module: str) -> Bools:
        """Where selective recompute names `module`; Megatron's default is core_attn."""
        names = self.columns.recomputes(module)
        if module == "core_attn":
            names = names | self.columns.among("recompute_modules", "none")
        return self.columns.among("recompute_granularity", "selective") & names

    def _split(self, dropped: list[tuple[str, Floats]], kept: Floats) -> tuple[Floats, Floats]:
        """Kept and dropped bytes, the parts of `dropped` counted where they belong."""
        gone = np.zeros_like(self.tokens)
        for module, amount in dropped:
            recomputed = self._recomputed(module)
            kept, gone = kept + np.where(recomputed, 0, amount), gone + np.where(recomputed, amount, 0)
        return kept, gone

    def _norm(self, elements: Floats, feeds_linear: bool = True) -> Floats:
        """What a norm keeps beyond its input: its output; Torch's RMSNorm also the input in fp32, and normalised."""
        output = elements * (self.linear if feeds_linear else self.size)
        if self.fused or self.model.normalization == "LayerNorm":
            return output
        return output + elements * (4.0 if self.size == 4 else 8.0)

    def _norm_backward(self, held: Floats) -> Floats:
        """Backward of the norm in front, beyond all that the part `held`: by then only the norm's input is left of it.

        Torch's RMSNorm is made of products: five fp32 tensors of the gradient of its square root are alive at once.
        """
        if self.fused or self.model.normalization == "LayerNorm":
            return np.zeros_like(held)
        return (5 + 1) * 4.0 * self.hidden - held

    def _norm_input(self) -> Floats:
        """The hidden state that a layer's norm keeps as it came; Torch's RMSNorm keeps an fp32 copy instead.

        And all that the second norm of a sandwich keeps, which is never recomputed alone.
        """
        keeps = self._keeps_norm_input
        kept = self.state if keeps else np.where(self._recomputed("layernorm"), self.state, 0)
        if not self.model.sandwich_layernorm:
            return kept
        return kept + self._norm_inside() + (self.state if keeps else 0)

    def _norm_inside(self) -> Floats:
        """What a norm of the hidden state keeps beyond its input and its output."""
        return self._norm(self.hidden, False) - self.hidden * self.size

    def attention(self) -> Part:
        """The input, its norm, and attention up to the residual sum."""
        if self.model.multi_latent_attention:
            return self._latent_attention()
        model, share = self.model, self.tokens / self.tp
        query = share * model.num_attention_heads * model.kv_channels
        # With more ranks than groups each rank has one, and gathers the projection to find it.
        group = self.tokens * np.maximum(model.num_query_groups / self.tp, 1) * model.kv_channels
        rotated, core_kept, extra = self._grouped_inputs(query, group)
        scores = self._scores()
        core = np.where(scores > 0, 2 * scores, share * model.num_attention_heads * 4) + self._mask()
        norm = self._norm(self.hidden)
        kept, dropped = self._split(
            [("core_attn", core), ("layernorm" if not self.fused else "", norm)],
            self._norm_input() + (rotated + core_kept + query) * self.size + extra,
        )
        gradients = (2 * query + 2 * group) * self.size + self._fp32_query(query) + 2 * scores
        gradients += self._across_context(query, query, 2 * group)
        gradients = np.maximum(gradients, self._norm_backward(kept + dropped))
        return Part(
            kept=kept,
            dropped=dropped,
            forward=np.zeros_like(kept),
            backward=self.state + np.maximum(gradients, self._weight_gradient(query)),
        )

    def _grouped_inputs(self, query: Floats, group: Floats) -> tuple[Floats, Floats, Floats]:
        """Elements of rotated query and key; of values and what keeps them alive; bytes of tables and inner norms."""
        model = self.model
        rotary = model.position_embedding_type == "rope"
        whole = self.tp > model.num_query_groups
        mixed = query * np.where(whole, self.tp, 1) + 2 * group * np.where(whole, model.num_query_groups, 1)
        normed = model.qk_layernorm
        if self.fused:
            # The fused kernels keep query, key and value alone; an inner norm keeps its input, the mixed projection.
            return query + group, group + (mixed + query if normed else 0), np.zeros_like(query)
        tables = self._rotary_factors(model.kv_channels) if rotary else np.zeros_like(query)
        copied = rotary or normed
        # An inner norm keeps its input, a copy of the query's part; Torch's RMSNorm another one in fp32 instead.
        inner, holds = np.zeros_like(query), normed and self._keeps_norm_input
        if normed:
            copies = (query + (0 if rotary else group)) * self.size if holds else 0
            inner = copies + (self._norm(query + group, False) - (query + group) * self.size)
        # Recomputed attention gathers again: it keeps what comes in.
        gathered = (self.cp > 1) & ~self._recomputed("core_attn")
        # The values are a view of the mixed projection; gathered over cp they are their own, as the keys are.
        keys = np.where(gathered, 2 * group * self.cp, group if copied else 0)
        values = np.where(gathered & np.bool_(copied and not holds), 0, mixed)
        return (query if copied else 0) + keys, values, tables + inner

    def _rotary_factors(self, width: int) -> Floats:
        """Sines and cosines of a rank's positions, which plain Torch makes for the query and again for the key."""
        return 4.0 * self.seq / self.cp * width * self.size

    def _scores(self) -> Floats:
        """Every head's scores where they are bounded, of which attention keeps two: the bounded and the softmax."""
        heads = 0 if self.model.attn_logit_softcapping is None else self.model.num_attention_heads
        return heads * self.tokens / self.tp * self.seq * self.size

    def _mask(self) -> Floats:
        """Torch keeps an explicit mask of a layer, [tokens of a rank, tokens], where causal alone does not say it."""
        if self.model.attn_logit_softcapping is not None:
            return self.seq / self.cp * self.seq  # a byte each: the scores are masked before the softmax
        if self.fused:
            return np.zeros_like(self.tokens)
        pairs = self.seq / self.cp * self.seq * self.size
        if (
            self.model.softmax_type != "vanilla"
        ):  # an additive mask of each head, with the sink as one more key
            return pairs * (1 + 1 / self.seq) * self.model.num_attention_heads / self.tp
        return np.where((self.cp > 1) | (self.model.window_size is not None), pairs, 0)

    def _fp32_query(self, query: Floats) -> Floats:
        """The query's gradient that fused attention sums up in fp32 (FlashAttention and cuDNN alike)."""
        return query * 4 if self.fused else np.zeros_like(query)

    def _across_context(self, query: Floats, output: Floats, key_value: Floats) -> Floats:
        """Bytes of backward over context ranks beyond a ring's, of elements of a rank's own share.

        `all_gather` has keys and values of the whole sequence, and their gradients; `a2a` sends all that it computes
        with, and the gradients, through a copy (Transformer Engine: context_parallel.py, AttnFuncWithCPAndKVAllGather
        and AttnFuncWithCPAndQKVOA2A). Plain Torch always gathers.
        """
        if not self.fused or not (self.cp > 1).any():
            return np.zeros_like(query)
        gathered = np.where(
            self.columns.among("cp_comm_type", "all_gather"), 2 * key_value * (self.cp - 1), 0
        )
        sent = np.where(self.columns.among("cp_comm_type", "a2a"), query + output + key_value, 0)
        return np.where(self.cp > 1, (gathered + sent) * self.size, 0)

    def _weight_gradient(self, inner: Floats) -> Floats:
        """Backward of the output projection: gradient of its input, and of its weight where that is not fused."""
        model = self.model
        if self.fused:
            return inner * self.size
        heads = model.num_attention_heads
        width = heads * ((model.v_head_dim or 0) if model.multi_latent_attention else model.kv_channels)
        return inner * self.size + width * model.hidden_size / self.tp * self.size

    def _latent_attention(self) -> Part:
        model, share = self.model, self.tokens / self.tp
        assert model.kv_lora_rank and model.qk_head_dim and model.qk_pos_emb_head_dim and model.v_head_dim
        heads = model.num_attention_heads
        query = share * heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
        value = share * heads * model.v_head_dim
        # The down-projections are whole on every tensor parallel rank; sequence parallelism splits their tokens.
        tokens = self.hidden / model.hidden_size
        query_rank, latent = tokens * (model.q_lora_rank or 0), tokens * model.kv_lora_rank
        down = query_rank + latent + tokens * model.qk_pos_emb_head_dim
        inner_norms = query_rank + latent if model.qk_layernorm else np.zeros_like(latent)
        up, core, again = self._latent_core(query, value, share * heads)
        kept, dropped = self._split(
            [
                ("layernorm", self._norm(self.hidden)),
                ("mla_up_proj", self._norm(inner_norms) + up),
                ("core_attn", core),
            ],
            self._norm_input() + (down + value) * self.size,
        )
        gradients = (2 * query + 2 * value) * self.size + self._fp32_query(query)
        gradients += self._across_context(query, value, query + value)
        if not self.fused:  # the gradient of the probabilities, of the scores, and of the values
            gradients = np.maximum(gradients, 4.0 * (2 * share * heads * self.seq + value * self.cp)) + again
        gradients = np.maximum(gradients, self._norm_backward(kept + dropped))
        return Part(
            kept=kept,
            dropped=dropped,
            forward=np.zeros_like(kept),
            backward=self.state + np.maximum(gradients, self._weight_gradient(value)),
        )

    def _latent_core(self, query: Floats, value: Floats, rows: Floats) -> tuple[Floats, Floats, Floats]:
        """Bytes that attention keeps of what the up-projections made, and of its own; and that come back beside it.

        Torch has no fused kernel for values narrower than keys. Its plain one works in fp32 and keeps the scaled
        query, the scaled and gathered keys, the gathered values and the probabilities.
        """
        made = (2 * query + value) * self.size
        if self.fused:
            return made, rows * 4, np.zeros_like(query)
        alone = np.where((self.cp == 1) & np.bool_(self.size == 4), value * 4, 0)  # the values as they came
        up = np.where(self._recomputed("core_attn"), made, alone)
        core = 4.0 * (query + (query + value) * self.cp + rows * self.seq) - alone
        return up, core, np.where(self._recomputed("mla_up_proj"), made - up, 0)

    def dense_mlp(self) -> Part:
        """The sum behind attention, its norm, and the dense MLP."""
        share, hidden = self.tokens / self.tp, self.model.hidden_size
        width = share * self.model.ffn_hidden_size
        inner, backward = self._mlp(width, hidden * self.model.ffn_hidden_size / self.tp)
        norm = self._norm(self.hidden)
        # Transformer Engine's MLP has the norm inside; Torch's stands before it.
        parts = [("mlp", inner + norm)] if self.fused else [("mlp", inner), ("layernorm", norm)]
        kept, dropped = self._split(parts, self._norm_input())
        # Sequence parallelism gathers the incoming gradient before the row-parallel projection's products.
        gathered = np.where(self.sp, self.full_hidden * self.size, 0)
        backward = np.maximum(backward, gathered + width * self.size) + np.where(
            self._recomputed("mlp"), self.state, 0
        )
        backward = np.maximum(backward, self._norm_backward(kept + dropped))
        kept = kept + 2 * self._between_nodes()
        return Part(kept=kept, dropped=dropped, forward=np.zeros_like(kept), backward=self.state + backward)

    def _mlp(self, width: Floats, matrix: Floats | float, weighted: bool = False) -> tuple[Floats, Floats]:
        """Bytes kept between the two projections, and of backward, for `width` elements a projection's output.

        `matrix` is the elements of one weight matrix: plain Torch makes its gradient before adding it up.
        """
        gated = 2 if self.model.gated_linear_unit else 1
        if self.fused:
            kept = width * (gated * self.size + self.linear)
            return kept, width * gated * self.size
        # Torch: the projection, the activation, the linear half plus its offset, their product, times probabilities.
        steps = (3 if self.model.gated_linear_unit else 1) + weighted
        kept = width * (gated + steps) * self.size
        weight_gradient = matrix * self.size
        second = width * self.size + weight_gradient
        # Probabilities are fp32, and so are the products with them and their gradients.
        activation = width * (14.0 if weighted and self.size < 4 else gated * self.size)
        first = (gated * weight_gradient) - width * steps * self.size + self.full_hidden * self.size
        return kept, np.maximum(np.maximum(second, activation), first)

    def experts_mlp(self) -> Part:
        """The sum behind attention, its norm, router, shared experts, dispatch and routed experts."""
        model = self.model
        assert model.num_moe_experts and model.moe_ffn_hidden_size and model.moe_router_topk
        tokens = self.hidden / model.hidden_size
        rows = tokens * model.moe_router_topk * self.load.kept
        dispatched = rows * self.etp * model.hidden_size
        width = rows * model.moe_ffn_hidden_size
        # Layers' loads add up in what they keep; passes go through one layer, the fullest at the worst.
        worst = self.load.worst / self.load.kept
        matrix = expert(model).sharded / self.etp / self._matrices()
        inner = self._mlp(width, matrix, True)[0]
        # Transformer Engine takes a rank's experts at once, plain Torch one after the other.
        at_once = 1 if self.fused else model.num_moe_experts / self.ep
        inner_backward = self._mlp(width * worst / at_once, matrix, True)[1]
        shared, shared_backward = self._shared()
        local = model.num_moe_experts / self.ep
        activation = width * self.linear if self.fused else np.zeros_like(width)
        norm = self._norm(self.hidden)
        router = tokens * model.num_moe_experts * 14
        routed = dispatched * self.linear + inner - activation + router
        whole = self._recomputed("moe")
        kept, dropped = self._split(
            [("layernorm", norm), ("moe_act", activation), ("shared_experts", shared)],
            self._norm_input() + routed,
        )
        everything = routed + activation + shared
        input_kept = np.where(self._recomputed("layernorm"), 0, norm)
        kept = np.where(whole, self._norm_input() + input_kept, kept)
        dropped = np.where(whole, everything + norm - input_kept, dropped)
        arrived = dispatched * worst
        forward = self._dispatch_forward(arrived, local)
        backward = np.maximum(2 * arrived * self.size, arrived * self.size + inner_backward)
        # The gradient of all tokens, which came in fp32, and then that of a rank's own.
        grid = self.expert_grid()
        gathered = grid + np.maximum(grid * (4 / self.size if self.size < 4 else 0), arrived * self.size)
        gathers = self._gathers_experts() & (self.ep * self.etp > 1)
        backward = np.maximum(backward, np.where(gathers, gathered, 0))
        backward = np.maximum(backward, shared_backward)
        backward = np.maximum(backward, self._norm_backward(kept + dropped))
        again = np.where(whole, forward, 0)
        shares = model.moe_shared_expert_intermediate_size is not None
        return Part(
            kept=kept + (2 + shares) * self._between_nodes(),
            dropped=dropped,
            forward=forward,
            backward=self.state + np.maximum(backward, again),
        )

    @property
    def overlaps_experts(self) -> Bools:
        """Where a layer's backward pass goes beside the forward pass of a layer of the next micro-batch."""
        return self.columns.on("overlap_moe_expert_parallel_comm")

    def _between_nodes(self) -> Floats:
        """A state that passes between two nodes of a layer's schedule, where communication of experts overlaps.

        Autograd alone would not keep it, but each node is a graph of its own, which holds what comes and goes: two
        states more a layer, three with a shared expert, none where the norms are recomputed, as counted on
        Megatron-Core 0.16 (pipeline_parallel/utils.py, ScheduleNode).
        """
        return np.where(self.overlaps_experts & ~self._recomputed("layernorm"), self.state, 0)

    def _matrices(self) -> int:
        return 3 if self.model.gated_linear_unit else 2

    def _shared(self) -> tuple[Floats, Floats]:
        width = self.model.moe_shared_expert_intermediate_size
        if width is None:
            return np.zeros_like(self.tokens), np.zeros_like(self.tokens)
        kept, backward = self._mlp(self.tokens / self.tp * width, width * self.model.hidden_size / self.tp)
        # A gate keeps what it weighs.
        return kept + (self.state if self.model.moe_shared_expert_gate else 0), backward

    def _dispatch_forward(self, dispatched: Floats, local: Floats) -> Floats:
        """Copies of the dispatched tokens alive at once, beside what is kept, and the shared experts' output.

        Python frames hold the permuted tokens and what the all-to-all brought while the experts' output is put back
        in order and sent (moe_layer.py, custom_forward): without either step there is one copy less.
        """
        sorts, sends = (local > 1).astype(np.float64), (self.ep > 1).astype(np.float64)
        copies = 1 + 2 * sorts + sends * (2 - sorts)
        flex = self.columns.among("moe_token_dispatcher_type", "flex")
        if flex.any():
            # DeepEP brings each token once a rank, and the permute is of what came; HybridEP permutes as it brings.
            topk = self.model.moe_router_topk or 1
            once = self.ep / topk * (1 - (1 - 1 / self.ep) ** topk)
            deepep = self.columns.among("moe_flex_dispatcher_backend", "deepep")
            copies = np.where(flex, 1 + np.where(deepep, once, 0), copies)
        alltoall = copies * dispatched * self.size
        # The all-gather dispatcher puts back every token of the expert grid instead, and sums them up in fp32.
        everything = self.expert_grid()
        copy = 4 / self.size if self.size < 4 else 0.0
        in_fp32 = np.where(self.ep * self.etp > 1, copy * (everything + self.state), 0)
        gathered = everything + np.maximum(dispatched * self.size, in_fp32)
        shared = self.state if self.model.moe_shared_expert_intermediate_size is not None else 0
        return np.where(self._gathers_experts(), gathered, alltoall) + shared

    def _gathers_experts(self) -> Bools:
        return self.columns.among("moe_token_dispatcher_type", "allgather")

    def expert_grid(self) -> Floats:
        """Bytes of the hidden states of all tokens of an expert grid."""
        return self.state * self.ep * self.etp

    def head(self, vocabulary: Floats) -> Head:
        """The loss of one micro-batch over `vocabulary` logits a rank and token, and multi-token prediction's."""
        logits = self.tokens * vocabulary
        losses = 1 + (self.model.mtp_num_layers or 0)
        norm = self._norm(self.hidden, False) + (self.state if self._keeps_norm_input else 0)
        # The bent logits are gone once theirs is there, and while it is made it stands beside that of the loss.
        bounded = 0 if self.model.final_logit_softcapping is None else logits * self.size
        gradient = self.full_hidden * self.size + np.where(self.sp, self.state, 0) - bounded
        # Transformer Engine's loss turns bf16 logits into their gradient in place; Megatron's own works in fp32, on a
        # copy beside the bf16 logits and beside their gradient.
        softmax, copy = (self.size, 0.0) if self.fused or self.size == 4 else (4.0, self.size)
        if not self.fused:
            weight_gradient = vocabulary * self.model.hidden_size * self.size
            projection = gradient + weight_gradient - logits * (softmax - self.size)
            # The logits of multi-token prediction are still there beside the model's own.
            gradient = np.maximum(projection, logits * copy * min(losses, 2))
        kept = losses * (norm + logits * softmax + bounded)
        return Head(kept=kept, norm=norm, backward=np.maximum(gradient, bounded))

    def pipeline_tensors(
        self, row: NDArray[np.int64], behind: Bools, forwards_left: NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """Hidden states that the schedule holds beside what is in flight, for stages `behind` the first.

        At a layer's pass, and at the loss. 1F1B: the gradient that was sent back last, until the next one is made.
        Interleaved, counted on traced runs of the schedule (schedules.py): each chunk holds the input that it took
        last, tensors received early wait `group - pp` turns for theirs, and overlapped receives have buffers; but
        no more wait than forward passes are left.
        """
        vpp, pp = self.columns["vpp"][row], self.columns["pp"][row]
        group = self.columns["microbatch_group_size_per_vp_stage"][row]
        early = self.columns.on("overlap_p2p_comm")[row]
        waiting = vpp - 2 + np.where(group > 0, group - pp, 0)
        most = forwards_left + 1 + behind
        layer = np.minimum(2 + early + behind * (2 + 2 * early) + waiting, most)
        loss = np.minimum(behind + 3 * early + waiting, most)
        layer, loss = (np.where(vpp > 1, states, behind) for states in (layer, loss))
        return self.state[row] * layer, self.state[row] * loss

    def optimizer_step(self, vocabulary: Floats, weights: Floats) -> Floats:
        """Torch's Adam makes a root and a denominator of the weight that it updates; fused Adam makes nothing.

        The largest is the embedding's, or of the `weights` that this rank updates what is in one piece.
        """
        if self.fused:
            return np.zeros_like(weights)
        return 2 * 4.0 * np.minimum(vocabulary * self.model.hidden_size, weights)

    def mtp_extra(self) -> Floats:
        """Kept by one multi-token-prediction layer around its layer.

        The embedding of its tokens, that and the state joined, what their two norms keep beside that, and one more
        copy of the final norm's output (multi_token_prediction.py, _concat_embeddings and forward).
        """
        return (4 if self._keeps_norm_input else 3) * self.state + 2 * self._norm_inside()

    def buffers(
        self, dense: Floats, moe: Floats, last: Bools, vocabulary: Floats, row: NDArray[np.int64]
    ) -> Floats:
        """Held for the whole run beside the model, of stages with `dense` and `moe` layers of layouts `row`.

        Transformer Engine keeps, for the gradient hooks, one empty gradient of every shape of weight that it
        fuses the accumulation of (module/base.py, get_dummy_wgrad), and workspaces for cuBLAS: one, and one for
        each of the four streams of a grouped product (cpp_extensions/gemm.py); Torch has its own. Sequence
        parallelism gathers the input of the output layer into a buffer (tensor_parallel/layers.py), the same that the
        all-gather dispatcher uses (moe/token_dispatcher.py).
        """
        gathers = self.sp[row] & (last if self.fused else np.ones_like(last))
        total = np.where(gathers, self.full_hidden[row] * self.size, 0)
        gathers = (self._gathers_experts() & (self.ep * self.etp > 1))[row] & (moe > 0)
        total = np.maximum(total, np.where(gathers, self.expert_grid()[row], 0))
        total += self._rotary_tables() * self.columns["vpp"][row]
        if not self.fused:
            return total
        model, size = self.model, self.size
        mlp = (3 if model.gated_linear_unit else 2) * model.hidden_size
        tp, etp = self.tp[row], self.etp[row]
        weights = np.where(dense + moe > 0, self._attention_weights()[row], 0)
        weights += np.where(dense > 0, mlp * model.ffn_hidden_size / tp, 0)
        widths = (model.moe_ffn_hidden_size or 0) / etp + (
            model.moe_shared_expert_intermediate_size or 0
        ) / tp
        weights += np.where(moe > 0, mlp * widths, 0)
        weights += np.where(last, vocabulary * model.hidden_size, 0)
        workspaces = 1 + 4 * (moe > 0) + (last | (moe > 0))
        return total + weights * size + workspaces * CUBLAS_WORKSPACE_BYTES

    def _rotary_tables(self) -> float:
        """Angles of every position, fp32, made once a model chunk and kept twice (rotary_pos_embedding.py, get_emb)."""
        model = self.model
        if model.position_embedding_type != "rope":
            return 0.0
        width = model.qk_pos_emb_head_dim if model.multi_latent_attention else model.kv_channels
        return 2.0 * self.seq * (width or 0) * 4

    def _attention_weights(self) -> Floats:
        parameters = attention(self.model)
        return parameters.sharded / self.tp + parameters.replicated


CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""On Hopper and newer (Transformer Engine: get_cublas_workspace_size_bytes; PyTorch: CUBLAS_WORKSPACE_CONFIG)."""
