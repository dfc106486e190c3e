"""Parameters of a model, module by module: the one place of each count.

The counts are those of Megatron-Core's own modules (attention.py, multi_latent_attention.py, mlp.py,
moe/router.py, multi_token_prediction.py), without the vocabulary's padding; a test builds the real modules
and compares. Buffers, such as the router's expert bias, are no parameters.
"""

from dataclasses import dataclass

from tuner.core.workload import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """The parameters of one module, by how tensor parallelism holds them."""

    sharded: int
    """Divided by tp (by etp in a routed expert)."""
    replicated: int
    """Whole on every such rank."""

    @property
    def total(self) -> int:
        """All of them, each once."""
        return self.sharded + self.replicated


_NONE = Parameters(sharded=0, replicated=0)


def norm(model: Model, width: int | None = None) -> int:
    """Parameters of one norm over `width` (the hidden size): scale, and shift with LayerNorm."""
    return (2 if model.normalization == "LayerNorm" else 1) * (width or model.hidden_size)


def layer_norms(model: Model) -> int:
    """Parameters of one layer's norms around attention and MLP, whole on each rank."""
    return (4 if model.sandwich_layernorm else 2) * norm(model)


def attention(model: Model) -> Parameters:
    """One layer's attention; latent down-projections, inner norms and output bias are whole on each rank."""
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
    """The MLP of one dense layer."""
    return _mlp(model, model.ffn_hidden_size)


def expert(model: Model) -> Parameters:
    """One routed expert; nothing in a dense model."""
    width = model.moe_ffn_hidden_size
    return _mlp(model, width) if width else _NONE


def shared_experts(model: Model) -> Parameters:
    """The shared experts of one layer together and their gate; nothing without them."""
    width = model.moe_shared_expert_intermediate_size
    if not width:
        return _NONE
    experts = _mlp(model, width)
    gate = model.hidden_size if model.moe_shared_expert_gate else 0
    return Parameters(sharded=experts.sharded, replicated=experts.replicated + gate)


def router(model: Model) -> int:
    """One layer's router, whole on every rank."""
    return (model.num_moe_experts or 0) * (model.hidden_size + (1 if model.add_bias_linear else 0))


def embedding(model: Model) -> int:
    """Token embedding (divided by tp; vocabulary not padded) and learned positions (whole on a rank)."""
    learned = model.position_embedding_type == "learned_absolute"
    return (model.vocab_size + (model.max_position_embeddings if learned else 0)) * model.hidden_size


def output(model: Model) -> int:
    """The output layer; 0 where it shares the embedding's weights."""
    return 0 if model.share_embeddings_and_output_weights else model.vocab_size * model.hidden_size


def layer(model: Model, moe: bool, experts: int | None = None) -> int:
    """One whole layer with its norms; `moe` with `experts` of its routed experts, all by default."""
    around = attention(model).total + layer_norms(model)
    if not moe:
        return around + dense_mlp(model).total
    count = model.num_moe_experts if experts is None else experts
    return around + router(model) + shared_experts(model).total + (count or 0) * expert(model).total


def mtp_layers(model: Model) -> int:
    """All multi-token-prediction layers: three norms, a projection and a layer of the last kind each.

    They share the embedding and the output layer with the model.
    """
    each = 3 * norm(model) + 2 * model.hidden_size**2 + layer(model, model.moe_layer_pattern()[-1])
    return (model.mtp_num_layers or 0) * each


def total_parameters(model: Model) -> int:
    """Parameters of the model as published sizes count them: embeddings in, shared ones once; MTP layers out.

    `total_parameters + mtp_layers` is what a training job holds, besides the vocabulary's padding.
    """
    return _sum(model, None)


def active_parameters(model: Model) -> int:
    """Parameters that one token passes: as `total_parameters`, with `moe_router_topk` experts a layer.

    Model cards differ: Qwen, Mistral and Ai2 count both embeddings, as here; OpenAI and DeepSeek leave out
    the look-up table, GLM and Moonlight both.
    """
    return _sum(model, model.moe_router_topk)


def _sum(model: Model, experts: int | None) -> int:
    moe = sum(model.moe_layer_pattern())
    layers = moe * layer(model, True, experts) + (model.num_layers - moe) * layer(model, False)
    return embedding(model) + layers + norm(model) + output(model)
