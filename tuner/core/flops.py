"""FLOPs of a model as Megatron counts them: forward and backward passes, without recomputation.

Source: Megatron Bridge, training/utils/flop_utils.py, `num_floating_point_operations` (`transformer_flops`). The
router, the norms before attention and MLP, the embedding look-up, softmax, the optimizer and communication are not
counted. Functions whose name ends in `macs` return a number of multiply-adds in the forward pass of one token.
"""

from tuner.core.workload import Model, Workload

FLOPS_PER_MAC = 6
"""FLOPs of a whole step per multiply-add of the forward pass: 2 in the forward pass and 4 in the backward pass."""


def model_flops_per_token(workload: Workload, tp: int = 1) -> float:
    """Return the FLOPs of the forward and the backward pass per token, at the workload's sequence length.

    `tp` determines how far Megatron pads the vocabulary; the logits of the padding are counted, as Megatron does. A
    layer of multi-token prediction counts as one more layer like the last decoder layer, with its own projection and
    logits.
    """
    model, seq_length = workload.model, workload.seq_length
    mtp = model.mtp_num_layers or 0
    pattern = model.moe_layer_pattern()
    moe_layers = (*pattern, *pattern[-1:] * mtp)
    mlps = sum(mlp_macs(model, moe) for moe in moe_layers)
    cores = sum(
        core_attention_macs(model, seq_length, slides(model, n)) for n in range(1, len(moe_layers) + 1)
    )
    projections = len(moe_layers) * attention_projection_macs(model)
    logits = (mtp + 1) * model.hidden_size * model.padded_vocab_size(tp)
    return FLOPS_PER_MAC * (mlps + projections + cores + mtp * mtp_projection_macs(model) + logits)


def mlp_macs(model: Model, moe: bool) -> int:
    """Return the multiply-adds per token of the MLP of one layer.

    With `moe` they are those of the routed and shared experts that process a token, else those of the dense MLP.
    """
    matrices = 3 if model.gated_linear_unit else 2
    if not moe:
        return matrices * model.hidden_size * model.ffn_hidden_size
    routed = (model.moe_ffn_hidden_size or 0) * (model.moe_router_topk or 0)
    return matrices * model.hidden_size * (routed + (model.moe_shared_expert_intermediate_size or 0))


def attention_projection_macs(model: Model) -> int:
    """Return the multiply-adds per token of one layer's query, key, value and output projections.

    For multi-latent attention they include the norms of the latents.
    """
    heads, hidden = model.num_attention_heads, model.hidden_size
    if not model.multi_latent_attention:
        return 2 * hidden * model.kv_channels * (heads + model.num_query_groups)
    assert model.kv_lora_rank and model.qk_head_dim and model.v_head_dim
    query = heads * _query_key_width(model)
    rank = model.q_lora_rank
    query_macs = hidden * query if rank is None else rank * (hidden + query + 1)
    key_value_macs = model.kv_lora_rank * (hidden + heads * (model.qk_head_dim + model.v_head_dim) + 1)
    position = hidden * (model.qk_pos_emb_head_dim or 0)
    return query_macs + key_value_macs + position + heads * model.v_head_dim * hidden


def core_attention_macs(model: Model, seq_length: int, sliding: bool) -> float:
    """Return the multiply-adds per token of one layer's core attention: the scores, and the weighted sums of values.

    On average a token attends to half of the sequence, or to its window if the layer is `sliding`.
    """
    context = seq_length / 2
    if sliding and model.window_size is not None:
        window = sum(model.window_size) + 1
        if window < seq_length:
            context = window - window * (window - 1) / (2 * seq_length)
    value = model.v_head_dim if model.multi_latent_attention else model.kv_channels
    return context * model.num_attention_heads * (_query_key_width(model) + (value or 0))


def mtp_projection_macs(model: Model) -> int:
    """Return the multiply-adds per token of the projection and three norms of one layer of multi-token prediction."""
    return 3 * model.hidden_size + 2 * model.hidden_size**2


def slides(model: Model, layer_number: int) -> bool:
    """Return whether the layer `layer_number`, counted from 1, attends only within the model's window.

    Source: Megatron-Core, is_layer_window_attention.
    """
    if model.window_size is None:
        return False
    return model.window_attn_skip_freq is None or layer_number % model.window_attn_skip_freq != 0


def _query_key_width(model: Model) -> int:
    if not model.multi_latent_attention:
        return model.kv_channels
    return (model.qk_head_dim or 0) + (model.qk_pos_emb_head_dim or 0)
