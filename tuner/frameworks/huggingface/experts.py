"""Reads the fields of `Model` from Hugging Face configurations of mixtures of experts, with one function per family.

Each function takes the content of a `config.json` and returns values of Model's fields by name. It raises
UnsupportedError if the file states something that Model cannot, and KeyError if a key is missing.
"""

from collections.abc import Sequence

from tuner.frameworks.huggingface.dense import llama_fields, mistral_fields, qwen2_fields, qwen3_fields
from tuner.frameworks.huggingface.fields import (
    Config,
    Fields,
    UnsupportedError,
    decoder_fields,
    window_fields,
)


def qwen3_moe_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Qwen 3 model with experts."""
    return {**qwen3_fields(config), **_qwen_experts(config)}


def qwen2_moe_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Qwen 2 model with experts."""
    return {
        **qwen2_fields(config),
        **_qwen_experts(config),
        "add_qkv_bias": config.get("qkv_bias", True),
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _qwen_experts(config: Config) -> Fields:
    """Return the fields of `Model` for the experts of a Qwen 2 or 3 model, some of whose layers may be dense."""
    step, dense = config.get("decoder_sparse_step", 1), frozenset(config.get("mlp_only_layers") or ())
    pattern = [layer not in dense and (layer + 1) % step == 0 for layer in range(config["num_hidden_layers"])]
    return {
        **_experts(config, "num_experts", config["moe_intermediate_size"], pattern),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def olmoe_fields(config: Config) -> Fields:
    """Return the fields of `Model` for an OLMoE model."""
    if config.get("clip_qkv") is not None:
        raise UnsupportedError(f"key 'clip_qkv': {config['clip_qkv']}, which Megatron does not do")
    return {
        **llama_fields(config),
        **_experts(config, "num_experts", config["intermediate_size"]),
        "qk_layernorm": True,
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def mixtral_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Mixtral model."""
    return {**mistral_fields(config), **_experts(config, "num_local_experts", config["intermediate_size"])}


def gpt_oss_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a GPT-OSS model."""
    return {
        **decoder_fields(config),
        **_experts(config, "num_local_experts", config["intermediate_size"]),
        "activation_func": "quick_gelu",
        "add_bias_linear": config["attention_bias"],
        "add_qkv_bias": config["attention_bias"],
        **window_fields(config, config["layer_types"]),
        "softmax_type": "learnable",
        "moe_router_load_balancing_type": "none",
    }


def glm4_moe_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a GLM-4.5 model with experts."""
    return {
        **decoder_fields(config),
        **_deepseek_experts(config),
        **_balanced_sigmoid_router(config),
        "add_qkv_bias": config.get("attention_bias", False),
        "qk_layernorm": config.get("use_qk_norm", False),
    }


def deepseek_v3_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a DeepSeek-V3 model."""
    if config.get("topk_method", "noaux_tc") != "noaux_tc":
        raise UnsupportedError(
            f"key 'topk_method': {config['topk_method']!r}, where DeepSeek-V3 has 'noaux_tc'"
        )
    return {**_latent_attention(config), **_deepseek_experts(config), **_balanced_sigmoid_router(config)}


def deepseek_v2_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a DeepSeek-V2 model."""
    return {
        **_latent_attention(config),
        **_deepseek_experts(config),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "seq_aux_loss" if config.get("seq_aux", True) else "aux_loss",
    }


def _balanced_sigmoid_router(config: Config) -> Fields:
    """Return the fields of `Model` for DeepSeek-V3's router.

    Its sigmoid scores get a bias per expert that balances the experts: it changes which experts are chosen, but not
    their weights.
    """
    if not config.get("norm_topk_prob", True):
        raise UnsupportedError(
            "key 'norm_topk_prob': false, where Megatron always normalises a sigmoid router's weights"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
    }


def _latent_attention(config: Config) -> Fields:
    """Return the fields of `Model` for a decoder with DeepSeek's multi-head latent attention."""
    return {
        **decoder_fields(config),
        "num_query_groups": config["num_attention_heads"],
        "kv_channels": config["qk_nope_head_dim"],
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
    }


def _deepseek_experts(config: Config) -> Fields:
    """Return the fields of `Model` for the experts of a DeepSeek or GLM model, and for its multi-token prediction.

    The first layers may be dense, some experts may be shared, and the router may choose groups of experts first.
    """
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    pattern = [layer >= first and layer % step == 0 for layer in range(config["num_hidden_layers"])]
    width = config["moe_intermediate_size"]
    grouped = (config.get("n_group") or 1) > 1
    scaling = float(config.get("routed_scaling_factor", 1.0))
    return {
        **_experts(config, "n_routed_experts", width, pattern),
        "moe_shared_expert_intermediate_size": (config.get("n_shared_experts") or 0) * width or None,
        "moe_router_num_groups": config["n_group"] if grouped else None,
        "moe_router_group_topk": config["topk_group"] if grouped else None,
        "moe_router_topk_scaling_factor": None if scaling == 1.0 else scaling,
        "mtp_num_layers": config.get("num_nextn_predict_layers") or None,
    }


def _experts(config: Config, count_key: str, width: int, pattern: Sequence[bool] = ()) -> Fields:
    """Return the fields of `Model` for the routed experts.

    Args:
        config: The content of the file.
        count_key: The key under which the file states the number of experts.
        width: The hidden size of one expert's MLP.
        pattern: One value per layer, whether it has experts; empty if all layers have them.
    """
    fields = {
        "num_moe_experts": config[count_key],
        "moe_ffn_hidden_size": width,
        "moe_router_topk": config["num_experts_per_tok"],
    }
    return (
        fields
        if all(pattern)
        else {**fields, "moe_layer_freq": [int(has_experts) for has_experts in pattern]}
    )
