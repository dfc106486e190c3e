"""Reads the fields of `Model` from the Hugging Face configurations of dense models, with one function per family.

Each function takes the content of a `config.json` and returns values of Model's fields by name. It raises
UnsupportedError if the file states something that Model cannot, and KeyError if a key is missing.
"""

from types import MappingProxyType

from tuner.frameworks.huggingface.fields import (
    Config,
    Fields,
    UnsupportedError,
    decoder_fields,
    layer_kinds,
    refuse_sliding_window,
    window_fields,
)


def llama_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Llama model."""
    refuse_sliding_window(config)
    biases = config.get("attention_bias", False), config.get("mlp_bias", False)
    if biases[0] != biases[1]:
        raise UnsupportedError(
            "keys 'attention_bias' and 'mlp_bias' differ; Megatron's add_bias_linear sets both"
        )
    return {**decoder_fields(config), "add_bias_linear": biases[0]}


def mistral_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Mistral model."""
    window = config.get("sliding_window")
    # Hugging Face's window includes the token itself; Megatron's (left, right) counts only the tokens beside it.
    return {**decoder_fields(config), "window_size": [window - 1, 0] if window else None}


def qwen2_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Qwen 2 model."""
    refuse_sliding_window(config)
    return {**decoder_fields(config), "add_qkv_bias": True}


def qwen3_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Qwen 3 model."""
    refuse_sliding_window(config)
    if config.get("attention_bias", False):
        raise UnsupportedError("key 'attention_bias': true, which also biases the output projection")
    return {**decoder_fields(config), "qk_layernorm": True}


def glm_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a GLM-4 model."""
    return {**decoder_fields(config), "add_qkv_bias": config.get("attention_bias", False)}


def glm4_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a GLM-4-0414 model, which also has norms after attention and after the MLP."""
    return {**glm_fields(config), "sandwich_layernorm": True}


def nemotron_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Nemotron model."""
    if config.get("attention_bias", False) or config.get("mlp_bias", False):
        raise UnsupportedError("keys 'attention_bias' and 'mlp_bias', which Nemotron's models leave false")
    return {
        **decoder_fields(config, activation="relu2"),
        "activation_func": "squared_relu",
        "gated_linear_unit": False,
        "normalization": "LayerNorm",
    }


def gemma_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Gemma model."""
    if config.get("attention_bias", False):
        raise UnsupportedError("key 'attention_bias': true, which also biases the output projection")
    # Early files state the exact gelu in `hidden_act`, but transformers' class never reads that key.
    complete = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, **config}
    if complete["hidden_activation"] is None:
        complete["hidden_activation"] = "gelu_pytorch_tanh"
    return {**decoder_fields(complete, "hidden_activation", "gelu_pytorch_tanh"), "activation_func": "gelu"}


def gemma2_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Gemma 2 model."""
    return {
        **gemma_fields(config),
        **window_fields(config, layer_kinds(config, 2)),
        "sandwich_layernorm": True,
        "attn_logit_softcapping": config.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": config.get("final_logit_softcapping", 30.0),
    }


_GEMMA_3_DEFAULTS: Config = MappingProxyType(
    {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rope_theta": 1000000,
        "sliding_window": 4096,
    }
)
"""Defaults of transformers' Gemma3TextConfig for keys that Google's files leave out."""


def gemma3_fields(config: Config) -> Fields:
    """Return the fields of `Model` for a Gemma 3 text model."""
    complete = {**_GEMMA_3_DEFAULTS, **config}
    if complete.get("use_bidirectional_attention", False):
        raise UnsupportedError("key 'use_bidirectional_attention': true, where Megatron's decoder is causal")
    interval = complete.get("sliding_window_pattern") or complete.get("_sliding_window_pattern") or 6
    return {
        **gemma_fields(complete),
        **window_fields(complete, layer_kinds(complete, interval)),
        "sandwich_layernorm": True,
        "qk_layernorm": True,
        "attn_logit_softcapping": complete.get("attn_logit_softcapping"),
        "final_logit_softcapping": complete.get("final_logit_softcapping"),
    }
