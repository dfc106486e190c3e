"""Bytes of the attention of one layer and one micro-batch: what autograd saves, and what passes allocate beside it.

The numbers follow the source files that tuner/predict/memory/share.py names.
"""

import numpy as np

from tuner.core.columns import Bools, Floats
from tuner.predict.memory.share import HalfLayer, RankShare


def attention(share: RankShare) -> HalfLayer:
    """Return the bytes of a layer's attention and the norm in front of it, without the residual sum that follows."""
    return _latent_attention(share) if share.model.multi_latent_attention else _grouped_attention(share)


def _grouped_attention(share: RankShare) -> HalfLayer:
    model, tokens_per_head_rank = share.model, share.tokens / share.tp
    query = tokens_per_head_rank * model.num_attention_heads * model.kv_channels
    # If there are more tensor parallel ranks than query groups, each rank gathers the whole projection and takes one
    # group out of it.
    group = share.tokens * np.maximum(model.num_query_groups / share.tp, 1) * model.kv_channels
    rotated, core_kept, extra = _grouped_inputs(share, query, group)
    scores = _scores(share)
    core = np.where(scores > 0, 2 * scores, tokens_per_head_rank * model.num_attention_heads * 4)
    core, inputs = core + _mask(share), (rotated + core_kept) * share.size
    gradients = (2 * query + 2 * group) * share.size + _flash_sums(share, query, query) + 2 * scores
    gradients += _across_context(share, query, query, 2 * group)
    is_composed = _is_composed(share)
    if is_composed.any():
        # Composed attention works on fp32 copies, which are saved in place of its inputs. A norm of the key saves the
        # projection, whose part the key is.
        probabilities = tokens_per_head_rank * model.num_attention_heads * share.seq
        core = np.where(is_composed, 4.0 * (query + 2 * query * share.cp + probabilities), core)
        copied = is_composed & ~share.columns.drops("core_attn")
        inputs = np.where(copied, core_kept * share.size if model.qk_layernorm else 0, inputs)
        composed_backward = 4.0 * (2 * probabilities + query * share.cp)
        gradients = np.where(is_composed, np.maximum(gradients, composed_backward), gradients)
    kept, dropped = share.split(
        [("core_attn", core), ("" if share.fused else "layernorm", share.norm(share.hidden))],
        share.norm_input() + inputs + query * share.size + extra,
    )
    gradients = np.maximum(gradients, share.norm_backward(kept + dropped))
    return HalfLayer(
        kept=kept,
        dropped=dropped,
        forward=np.zeros_like(kept),
        backward=share.state + np.maximum(gradients, _output_backward(share, query)),
    )


def _grouped_inputs(share: RankShare, query: Floats, group: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the sizes of the inputs of core attention that are saved for the backward pass, as three parts.

    `query` and `group` are the numbers of elements of the query and of the keys on this rank. The values have as many
    elements as the keys.

    Returns:
        Elements of the rotated query and key; elements of the values, or of the projection if the values are a view of
        it; bytes of rotary tables and of the norms of query and key.
    """
    model = share.model
    is_rotary, is_normed = model.position_embedding_type == "rope", model.qk_layernorm
    gathers_projection = share.tp > model.num_query_groups
    projection = query * np.where(gathers_projection, share.tp, 1)
    projection = projection + 2 * group * np.where(gathers_projection, model.num_query_groups, 1)
    if share.fused:
        # The fused kernels save only query, key and value. A norm of query and key saves its input, the projection.
        return query + group, group + (projection + query if is_normed else 0), np.zeros_like(query)
    tables = _rotary_tables(share, model.kv_channels) if is_rotary else np.zeros_like(query)
    is_copied = is_rotary or is_normed
    # The norm of the query saves its input, which is a copy of the query's part of the projection. Torch's RMSNorm in
    # 16 bits saves a copy in fp32 instead.
    inner_norms, norms_keep_input = np.zeros_like(query), is_normed and share.keeps_norm_input
    if is_normed:
        inputs = (query + (0 if is_rotary else group)) * share.size if norms_keep_input else 0
        inner_norms = inputs + (share.norm(query + group, feeds_linear=False) - (query + group) * share.size)
    # Recomputed attention gathers keys and values again, so a rank saves them only for its own tokens.
    gathered = (share.cp > 1) & ~share.columns.drops("core_attn")
    # Values are a view of the projection. If they are gathered over cp, they are a tensor of their own, like the keys.
    keys = np.where(gathered, 2 * group * share.cp, group if is_copied else 0)
    values = np.where(gathered & np.bool_(is_copied and not norms_keep_input), 0, projection)
    return (query if is_copied else 0) + keys, values, tables + inner_norms


def _rotary_tables(share: RankShare, width: int) -> Floats:
    """Return the bytes of the sines and cosines of a rank's positions, each of `width` elements per position.

    Plain Torch computes them once for the query and once for the key.
    """
    return 4.0 * share.seq / share.cp * width * share.size


def _scores(share: RankShare) -> Floats:
    """Return the bytes of one copy of the attention scores of a rank's heads if they are soft-capped, else 0.

    Attention saves two copies of such scores: after the cap, and after the softmax.
    """
    heads = 0 if share.model.attn_logit_softcapping is None else share.model.num_attention_heads
    return heads * share.tokens / share.tp * share.seq * share.size


def _mask(share: RankShare) -> Floats:
    """Return the bytes of the attention mask that one layer saves; 0 if the kernel needs no explicit mask.

    The mask has one row per token of the rank, and one column per token of the sequence.
    """
    if share.model.attn_logit_softcapping is not None:
        return share.seq / share.cp * share.seq  # one byte per pair: the scores are masked before the softmax
    if share.fused:
        return np.zeros_like(share.tokens)
    pairs = share.seq / share.cp * share.seq * share.size
    if share.model.softmax_type != "vanilla":
        # Each head has a mask that is added to the scores, with the sink as one more key.
        return pairs * (1 + 1 / share.seq) * share.model.num_attention_heads / share.tp
    return np.where((share.cp > 1) | (share.model.window_size is not None), pairs, 0)


def _is_composed(share: RankShare) -> Bools:
    """Return a mask of the layouts in which Torch composes attention on CUDA of matrix products; shape [rows].

    None of its kernels takes both a mask and grouped queries, so they leave no other way (sdp_utils.cpp).
    """
    model = share.model
    if not share.torch_on_cuda or model.num_query_groups == model.num_attention_heads:
        return np.zeros(len(share.tokens), dtype=bool)
    if model.attn_logit_softcapping is not None:  # the program composes it itself
        return np.zeros(len(share.tokens), dtype=bool)
    return (share.cp > 1) | np.bool_(model.window_size is not None or model.softmax_type != "vanilla")


def _flash_sums(share: RankShare, query: Floats, value: Floats) -> Floats:
    """Return the bytes of the sums of gradients that the backward pass of a fused attention needs.

    FlashAttention and cuDNN sum up the gradient of the query in fp32. Torch's FlashAttention also makes gradients of
    keys and values for each head, before it sums them up per query group. `query` is the number of elements of the
    query, and `value` that of one value per head. The result is 0 for plain Torch on CPU.
    """
    if share.fused:
        return query * 4
    if not share.torch_on_cuda:
        return np.zeros_like(query)
    is_grouped = share.model.num_query_groups != share.model.num_attention_heads
    return query * 4 + (query + value) * share.size * is_grouped


def _across_context(share: RankShare, query: Floats, output: Floats, key_value: Floats) -> Floats:
    """Return the bytes that attention's backward pass needs beyond those of ring attention, by `cp_comm_type`.

    `all_gather` needs keys and values of the whole sequence, and their gradients. `a2a` copies all inputs, outputs and
    gradients to send them (Transformer Engine: context_parallel.py, AttnFuncWithCPAndKVAllGather and
    AttnFuncWithCPAndQKVOA2A). The result is 0 with cp 1, and for plain Torch, which always gathers keys and values:
    other functions count them. `query`, `output` and `key_value` are numbers of elements on a rank before any exchange.
    """
    if not share.fused or not (share.cp > 1).any():
        return np.zeros_like(query)
    gathers, exchanges = (share.columns.among("cp_comm_type", kind) for kind in ("all_gather", "a2a"))
    gathered = np.where(gathers, 2 * key_value * (share.cp - 1), 0)
    sent = np.where(exchanges, query + output + key_value, 0)
    return np.where(share.cp > 1, (gathered + sent) * share.size, 0)


def _output_backward(share: RankShare, output: Floats) -> Floats:
    """Return the bytes of the gradients that the output projection of attention allocates in its backward pass.

    They are the gradient of its input, which has `output` elements, and with plain Torch also the gradient of its
    weight. Transformer Engine adds the latter directly to the accumulated gradient.
    """
    model = share.model
    if share.fused:
        return output * share.size
    heads = model.num_attention_heads
    width = heads * ((model.v_head_dim or 0) if model.multi_latent_attention else model.kv_channels)
    return output * share.size + width * model.hidden_size / share.tp * share.size


def _latent_attention(share: RankShare) -> HalfLayer:
    model, tokens_per_head_rank = share.model, share.tokens / share.tp
    assert model.kv_lora_rank and model.qk_head_dim and model.qk_pos_emb_head_dim and model.v_head_dim
    heads = model.num_attention_heads
    query = tokens_per_head_rank * heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    value = tokens_per_head_rank * heads * model.v_head_dim
    # Every tensor parallel rank has the whole down-projections; sequence parallelism splits their tokens.
    tokens = share.hidden / model.hidden_size
    query_rank, latent = tokens * (model.q_lora_rank or 0), tokens * model.kv_lora_rank
    down = query_rank + latent + tokens * model.qk_pos_emb_head_dim
    inner_norms = query_rank + latent if model.qk_layernorm else np.zeros_like(latent)
    up, core, again = _latent_core(share, query, value, tokens_per_head_rank * heads)
    kept, dropped = share.split(
        [
            ("layernorm", share.norm(share.hidden)),
            ("mla_up_proj", share.norm(inner_norms) + up),
            ("core_attn", core),
        ],
        share.norm_input() + (down + value) * share.size,
    )
    gradients = (2 * query + 2 * value) * share.size + _flash_sums(share, query, value)
    gradients += _across_context(share, query, value, query + value)
    if (
        not share.fused and not share.torch_on_cuda
    ):  # gradients of the probabilities, of the scores, and of the values
        scores = 2 * tokens_per_head_rank * heads * share.seq
        gradients = np.maximum(gradients, 4.0 * (scores + value * share.cp)) + again
    gradients = np.maximum(gradients, share.norm_backward(kept + dropped))
    return HalfLayer(
        kept=kept,
        dropped=dropped,
        forward=np.zeros_like(kept),
        backward=share.state + np.maximum(gradients, _output_backward(share, value)),
    )


def _latent_core(
    share: RankShare, query: Floats, value: Floats, head_rows: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return the bytes that multi-latent attention saves in core attention and in front of it, as three parts.

    Plain Torch on CPU has no fused kernel for values that are narrower than keys. Its attention works in fp32 and saves
    the scaled query, the scaled and gathered keys, the gathered values and the probabilities.

    Args:
        share: The rank's share.
        query: Number of elements of the query.
        value: Number of elements of the values.
        head_rows: Number of rows of the attention matrices: tokens times heads.

    Returns:
        Bytes of the up-projections' outputs that are saved; further bytes that core attention saves; bytes of the
        up-projections' outputs that the backward pass recomputes.
    """
    made = (2 * query + value) * share.size
    if share.fused or share.torch_on_cuda:
        return made, head_rows * 4, np.zeros_like(query)
    own_values = np.where((share.cp == 1) & np.bool_(share.size == 4), value * 4, 0)  # saved without a copy
    up = np.where(share.columns.drops("core_attn"), made, own_values)
    core = 4.0 * (query + (query + value) * share.cp + head_rows * share.seq) - own_values
    return up, core, np.where(share.columns.drops("mla_up_proj"), made - up, 0)
