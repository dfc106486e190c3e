"""The time of one layer's attention for one micro-batch, in milliseconds, for many layouts at once."""

from typing import Final

import numpy as np

from tuner.core.flops import core_attention_macs
from tuner.predict.time.context import ContextExchange
from tuner.predict.time.operations import Operations
from tuner.predict.time.passes import ModuleTime, PassTime

ATTENTION_EFFICIENCY: Final = 2 / 3
"""Rate of fused attention, divided by the rate of large matrix products. The latter is GEMM_EFFICIENCY times the peak,
so fused attention reaches 0.5 of the peak. Published: FlashAttention-2 reaches 0.5 to 0.73 of the peak on A100
(arXiv:2307.08691), FlashAttention-3 up to 0.75 on H100 (arXiv:2407.08608)."""
BACKWARD_ATTENTION: Final = 2.5
"""FLOPs of fused attention in the backward pass, divided by those in the forward pass: five products instead of two,
since the scores are computed again. Published: arXiv:2307.08691, section 4.1."""
SCORE_PASSES: Final = 5
"""Reads and writes of the score matrix in the forward pass of unfused attention: product, softmax, dropout, product,
minus those that caches serve. Chosen within what is plausible to suit vTrain's published step times on A100s, which
`python -m tests.bench.replay` compares with the predictions."""
CAP_PASSES: Final = 6
"""Reads and writes of scores or logits that are bounded (soft-capped): two scalings and a tanh, each a kernel of its
own. Counted: a kernel reads and writes once."""


def core_attention(operations: Operations, sliding: bool) -> ModuleTime:
    """Return the time of core attention, including the exposed communication of context parallelism; shape [rows].

    `sliding` says whether the layer attends over a sliding window.
    """
    ops, model = operations, operations.model
    heads, seq_length = model.num_attention_heads / ops.tp, ops.workload.seq_length
    macs = core_attention_macs(model, seq_length, sliding) * ops.tokens / ops.tp
    capped = model.attn_logit_softcapping is not None
    if ops.implementation != "torch" and not capped:
        forward_ms = ops.rates.attention_ms(2 * macs, ATTENTION_EFFICIENCY)
        backward_ms = BACKWARD_ATTENTION * forward_ms
    else:
        # Unfused attention computes the whole square of scores, although a causal mask discards half of it.
        square_flops = 4 * core_attention_macs(model, seq_length, False) * ops.tokens / ops.tp
        passes = SCORE_PASSES + (CAP_PASSES if capped else 0)
        score_bytes = passes * heads * ops.tokens * seq_length * ops.state_bytes
        forward_ms = ops.rates.attention_ms(square_flops, 1.0) + ops.rates.moved_ms(score_bytes, passes / 2)
        backward_ms = 2 * forward_ms
    exchange = ContextExchange(model, ops.rates, ops.layouts, ops.tokens)
    if ops.implementation != "transformer_engine":
        exchange_forward_ms, exchange_backward_ms = exchange.gathered_ms(gathers_again=False)
    else:
        exchange_forward_ms, exchange_backward_ms = exchange.exposed_ms(forward_ms, backward_ms)
    several = ops.cp > 1
    return ModuleTime(
        PassTime(attention_ms=forward_ms, cp_ms=np.where(several, exchange_forward_ms, 0.0)),
        PassTime(attention_ms=backward_ms, cp_ms=np.where(several, exchange_backward_ms, 0.0)),
    )


def projections(operations: Operations) -> dict[str, ModuleTime]:
    """Return the time of the matrix products before and after core attention, by module name.

    The times include the tensor-parallel collectives of these modules.
    """
    ops, model = operations, operations.model
    if model.multi_latent_attention:
        return _latent_projections(ops)
    query_key_value = model.kv_channels * (model.num_attention_heads + 2 * model.num_query_groups)
    width, hidden = model.kv_channels * model.num_attention_heads, model.hidden_size
    products = ops.gemm(ops.tokens, query_key_value / ops.tp, hidden)
    products += ops.gemm(ops.tokens, hidden, width / ops.tp)
    return {"projections": ops.with_tp_collectives(products)}


def _latent_projections(ops: Operations) -> dict[str, ModuleTime]:
    """Return the time of the matrix products of multi-latent attention, by module name.

    The up-projections are a module of their own (mla_up_proj), since selective recomputation can drop them by name.
    """
    model = ops.model
    heads, hidden = model.num_attention_heads / ops.tp, model.hidden_size
    query_rank, key_value_rank = model.q_lora_rank, model.kv_lora_rank or 0
    position = model.qk_pos_emb_head_dim or 0
    query = heads * ((model.qk_head_dim or 0) + position)
    key_value = heads * ((model.qk_head_dim or 0) + (model.v_head_dim or 0))
    down = ops.gemm(ops.split_tokens, (query_rank or 0) + key_value_rank + position, hidden)
    out = ops.gemm(ops.tokens, hidden, heads * (model.v_head_dim or 0))
    up = ops.gemm(ops.tokens, query, query_rank or hidden) + ops.gemm(ops.tokens, key_value, key_value_rank)
    return {"projections": ops.with_tp_collectives(down + out), "mla_up_proj": up}
