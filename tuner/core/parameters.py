"""Numbers of parameters of a model, counted module by module.

The counts are those of Megatron-Core's modules (attention.py, multi_latent_attention.py, mlp.py, moe/router.py,
multi_token_prediction.py) without the padding of the vocabulary; a test builds the modules and compares. Buffers, such
as the expert bias of the router, are not parameters.
"""

from dataclasses import dataclass

from tuner.core.workload import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of parameters of one module: those that tensor parallelism shards, and those that it replicates."""

    sharded: int
    """Number of parameters that are divided among the tp ranks (among the etp ranks in a routed expert)."""
    replicated: int
    """Number of parameters of which every tp rank (every etp rank in a routed expert) has a full copy."""

    @property
    def total(self) -> int:
        """Return the number of parameters of the whole module."""
        return self.sharded + self.replicated


_NONE = Parameters(sharded=0, replicated=0)


def norm(model: Model, width: int | None = None) -> int:
    """Return the number of parameters of one normalization over vectors of `width` elements (default: hidden size).

    A norm has a scale; LayerNorm has a shift too.
    """
    return (2 if model.normalization == "LayerNorm" else 1) * (width or model.hidden_size)


def layer_norms(model: Model) -> int:
    """Return the number of parameters of one layer's norms around attention and MLP; every rank has a full copy."""
    return (4 if model.sandwich_layernorm else 2) * norm(model)


def attention(model: Model) -> Parameters:
    """Return the numbers of parameters of one layer's attention.

    The latent down-projections, the norms inside attention and the output projection's bias are replicated on all tp
    ranks.
    """
    return _latent_attention(model) if model.multi_latent_attention else _grouped_attention(model)


def _grouped_attention(model: Model) -> Parameters:
    heads = model.num_attention_heads * model.kv_channels
    query_key_value = heads + 2 * model.num_query_groups * model.kv_channels
    bias = query_key_value if model.add_qkv_bias or model.add_bias_linear else 0
    return Parameters(
        sharded=model.hidden_size * (query_key_value + heads) + bias + _sinks(model),
        replicated=_output_bias(model) + (2 * norm(model, model.kv_channels) if model.qk_layernorm else 0),
    )


def _latent_attention(model: Model) -> Parameters:
    assert model.kv_lora_rank and model.qk_head_dim and model.qk_pos_emb_head_dim and model.v_head_dim
    heads, hidden, latent = model.num_attention_heads, model.hidden_size, model.kv_lora_rank
    query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    key_value = heads * (model.qk_head_dim + model.v_head_dim)
    output = heads * model.v_head_dim * hidden
    query_rank = model.q_lora_rank or 0
    down = hidden * (query_rank + latent + model.qk_pos_emb_head_dim)
    norms = norm(model, query_rank + latent) if model.qk_layernorm else 0
    return Parameters(
        sharded=(query_rank or hidden) * query + latent * key_value + output + _sinks(model),
        replicated=down + norms + _output_bias(model),
    )


def _output_bias(model: Model) -> int:
    return model.hidden_size if model.add_bias_linear else 0


def _sinks(model: Model) -> int:
    return model.num_attention_heads if model.softmax_type == "learnable" else 0


def _mlp(model: Model, width: int) -> Parameters:
    matrices = 3 if model.gated_linear_unit else 2
    bias = (matrices - 1) * width if model.add_bias_linear else 0
    return Parameters(sharded=matrices * model.hidden_size * width + bias, replicated=_output_bias(model))


def dense_mlp(model: Model) -> Parameters:
    """Return the numbers of parameters of the MLP of one dense layer."""
    return _mlp(model, model.ffn_hidden_size)


def expert(model: Model) -> Parameters:
    """Return the numbers of parameters of one routed expert, or zeros for a dense model."""
    width = model.moe_ffn_hidden_size
    return _mlp(model, width) if width else _NONE


def shared_experts(model: Model) -> Parameters:
    """Return the numbers of parameters of one layer's shared experts and their gate, or zeros if there are none."""
    width = model.moe_shared_expert_intermediate_size
    if not width:
        return _NONE
    experts = _mlp(model, width)
    gate = model.hidden_size if model.moe_shared_expert_gate else 0
    return Parameters(sharded=experts.sharded, replicated=experts.replicated + gate)


def router(model: Model) -> int:
    """Return the number of parameters of one layer's router; every rank has a full copy of it."""
    return (model.num_moe_experts or 0) * (model.hidden_size + (1 if model.add_bias_linear else 0))


def embedding(model: Model) -> int:
    """Return the number of parameters of the token embedding (without padding) and of learned positions, if any."""
    learned = model.position_embedding_type == "learned_absolute"
    return (model.vocab_size + (model.max_position_embeddings if learned else 0)) * model.hidden_size


def output(model: Model) -> int:
    """Return the number of parameters of the output layer; 0 if it shares the weights of the embedding."""
    return 0 if model.share_embeddings_and_output_weights else model.vocab_size * model.hidden_size


def layer(model: Model, moe: bool, experts: int | None = None) -> int:
    """Return the number of parameters of one decoder layer, including its norms.

    Args:
        model: The model.
        moe: Whether the layer has experts.
        experts: How many of the layer's routed experts are counted; None counts all.
    """
    attention_and_norms = attention(model).total + layer_norms(model)
    if not moe:
        return attention_and_norms + dense_mlp(model).total
    count = model.num_moe_experts if experts is None else experts
    routed = (count or 0) * expert(model).total
    return attention_and_norms + router(model) + shared_experts(model).total + routed


def mtp_layers(model: Model) -> int:
    """Return the number of parameters of all layers of multi-token prediction.

    Each has three norms, a projection, and a decoder layer like the model's last one. They share the embedding and the
    output layer with the model.
    """
    of_layer = 3 * norm(model) + 2 * model.hidden_size**2 + layer(model, model.moe_layer_pattern()[-1])
    return (model.mtp_num_layers or 0) * of_layer


def total_parameters(model: Model) -> int:
    """Return the number of parameters of the model as published sizes count them.

    The embedding and the output layer are counted, once if they share their weights; layers of multi-token prediction
    are not counted. A training job has `total_parameters + mtp_layers` parameters and the padding of the vocabulary.
    """
    return _sum(model, None)


def active_parameters(model: Model) -> int:
    """Return the number of parameters that take part in the forward pass of one token.

    It is `total_parameters` with only `moe_router_topk` routed experts per layer.

    Model cards differ. Qwen, Mistral and Ai2 count the embedding and the output layer, as this function does; OpenAI
    and DeepSeek leave out the embedding; GLM and Moonlight leave out both.
    """
    return _sum(model, model.moe_router_topk)


def _sum(model: Model, experts: int | None) -> int:
    """Return the number of parameters of the model with `experts` routed experts per layer; None counts all."""
    moe = sum(model.moe_layer_pattern())
    layers = moe * layer(model, True, experts) + (model.num_layers - moe) * layer(model, False)
    return embedding(model) + layers + norm(model) + output(model)
