"""Reads the architecture out of a Hugging Face `config.json`: one short mapping a family, by its model class.

What the file leaves to the model's code (norms of queries and keys, biases, the router's score, defaults) is
that of the class in `transformers`. Of a model of images and text it is the text model. Left out is what `Model`
does not hold, since it changes neither size nor, to speak of, speed: how much of a head is rotated and with how
many bases, scaling of positions, embeddings and scores, epsilons, initialisation, quantisation; and OLMoE's norms
of queries and keys, over all heads at once, count as Megatron's, over each.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tuner.core.workload import Model
from tuner.errors import InputError
from tuner.files import parse

Config = Mapping[str, Any]
Fields = dict[str, Any]


class _Unsupported(Exception):
    """The file asks for something that `Model` cannot state."""


def model_from_config(data: object, source: str) -> Model:
    """Translate the data of a `config.json`. `source` is its path, which also names the model.

    Raises:
        InputError: if the architecture is unknown, a key is missing, or the file asks for what `Model` lacks.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: is no Hugging Face config.json: holds no mapping")
    family = str(next(iter(data.get("architectures") or ()), ""))
    if family in REFUSED:
        raise InputError(
            f"{source}: key 'architectures': cannot read {family}: {REFUSED[family]}, which tuner.core.workload.Model "
            f"cannot state; known are {', '.join(sorted(FAMILIES))}"
        )
    if family not in FAMILIES:
        raise InputError(
            f"{source}: key 'architectures': cannot read {family or 'a file without it'}; known are "
            f"{', '.join(sorted(FAMILIES))}. State the model by hand, in a YAML file or inline as `model:`, "
            "with the fields of tuner.core.workload.Model"
        )
    try:
        fields = FAMILIES[family](data)
    except KeyError as error:
        raise InputError(f"{source}: missing key '{error.args[0]}', which {family} needs") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{source}: holds a value that {family} cannot have: {error}") from None
    except _Unsupported as error:
        raise InputError(f"{source}: {error}; state the model by hand, in Model's own fields") from None
    return parse(Model, {"name": _name(Path(source)), **fields}, source)


def _name(path: Path) -> str:
    return (path.absolute().parent.name if path.stem == "config" else path.stem).lower()


def _decoder(config: Config, activation_key: str = "hidden_act", activation: str = "silu") -> Fields:
    """What every family states in the same keys; with the one activation that its class is trained with."""
    if config.get(activation_key) != activation:
        raise _Unsupported(
            f"key '{activation_key}': {config.get(activation_key)!r}, where only '{activation}' can be read"
        )
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "rotary_base": _rotary_base(config),
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings", False),
    }


def _rotary_base(config: Config) -> int:
    # transformers 5 moved the base into `rope_parameters`; some files write a whole number as a float.
    parameters = config.get("rope_parameters") or config
    # By kind of layer, the base of those with full attention: the others' table is as large.
    return int(parameters.get("full_attention", parameters).get("rope_theta", 10000))


def _refuse_sliding(config: Config) -> None:
    if config.get("use_sliding_window", True) and config.get("sliding_window"):
        raise _Unsupported(
            f"key 'sliding_window': {config['sliding_window']}, which cannot be read for this family"
        )


def _alternating_window(config: Config, kinds: Sequence[str]) -> Fields:
    """The window of the layers whose kind is "sliding_attention"; `kinds` names one a layer."""
    sliding = [kind == "sliding_attention" for kind in kinds]
    every = sliding.index(False) + 1 if False in sliding else None
    if sliding != [every is None or n % every != 0 for n in range(1, len(sliding) + 1)]:
        raise _Unsupported("key 'layer_types': full attention does not come every so many layers")
    return {
        "window_size": [config["sliding_window"] - 1, 0] if any(sliding) else None,
        "window_attn_skip_freq": every,
    }


def _kinds(config: Config, every: int) -> Sequence[str]:
    """The kinds of the layers; where the file names none, each `every`th has full attention."""
    layers = range(1, config["num_hidden_layers"] + 1)
    return config.get("layer_types") or ["full" if n % every == 0 else "sliding_attention" for n in layers]


def _llama(config: Config) -> Fields:
    _refuse_sliding(config)
    biases = config.get("attention_bias", False), config.get("mlp_bias", False)
    if biases[0] != biases[1]:
        raise _Unsupported(
            "keys 'attention_bias' and 'mlp_bias' differ; Megatron's add_bias_linear sets both"
        )
    return {**_decoder(config), "add_bias_linear": biases[0]}


def _mistral(config: Config) -> Fields:
    window = config.get("sliding_window")
    # Its own token counts in Hugging Face's window, and not in Megatron's (left, right).
    return {**_decoder(config), "window_size": [window - 1, 0] if window else None}


def _qwen2(config: Config) -> Fields:
    _refuse_sliding(config)
    return {**_decoder(config), "add_qkv_bias": True}


def _qwen3(config: Config) -> Fields:
    _refuse_sliding(config)
    if config.get("attention_bias", False):
        raise _Unsupported("key 'attention_bias': true, which also biases the output projection")
    return {**_decoder(config), "qk_layernorm": True}


def _glm(config: Config) -> Fields:
    return {**_decoder(config), "add_qkv_bias": config.get("attention_bias", False)}


def _glm4(config: Config) -> Fields:
    return {**_glm(config), "sandwich_layernorm": True}


def _nemotron(config: Config) -> Fields:
    if config.get("attention_bias", False) or config.get("mlp_bias", False):
        raise _Unsupported("keys 'attention_bias' and 'mlp_bias', which Nemotron's models leave false")
    return {
        **_decoder(config, activation="relu2"),
        "activation_func": "squared_relu",
        "gated_linear_unit": False,
        "normalization": "LayerNorm",
    }


def _gemma(config: Config) -> Fields:
    if config.get("attention_bias", False):
        raise _Unsupported("key 'attention_bias': true, which also biases the output projection")
    # Early files name the exact gelu in `hidden_act`, which the class has never used.
    complete = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, **config}
    if complete["hidden_activation"] is None:
        complete["hidden_activation"] = "gelu_pytorch_tanh"
    return {**_decoder(complete, "hidden_activation", "gelu_pytorch_tanh"), "activation_func": "gelu"}


def _gemma2(config: Config) -> Fields:
    return {
        **_gemma(config),
        **_alternating_window(config, _kinds(config, 2)),
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
"""What Google's files leave to the class (transformers: Gemma3TextConfig)."""


def _gemma3(config: Config) -> Fields:
    complete = {**_GEMMA_3_DEFAULTS, **config}
    if complete.get("use_bidirectional_attention", False):
        raise _Unsupported("key 'use_bidirectional_attention': true, where Megatron's decoder is causal")
    every = complete.get("sliding_window_pattern") or complete.get("_sliding_window_pattern") or 6
    return {
        **_gemma(complete),
        **_alternating_window(complete, _kinds(complete, every)),
        "sandwich_layernorm": True,
        "qk_layernorm": True,
        "attn_logit_softcapping": complete.get("attn_logit_softcapping"),
        "final_logit_softcapping": complete.get("final_logit_softcapping"),
    }


def _text_model(read: Callable[[Config], Fields]) -> Callable[[Config], Fields]:
    """Read the text model of a file that states one of images beside it, as `read` does."""

    def read_text(config: Config) -> Fields:
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        return read({**tied, **config["text_config"]})

    return read_text


def _qwen3_moe(config: Config) -> Fields:
    return {**_qwen3(config), **_qwen_experts(config)}


def _qwen2_moe(config: Config) -> Fields:
    return {
        **_qwen2(config),
        **_qwen_experts(config),
        "add_qkv_bias": config.get("qkv_bias", True),
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _qwen_experts(config: Config) -> Fields:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    pattern = [n not in dense and (n + 1) % step == 0 for n in range(config["num_hidden_layers"])]
    return {
        **_experts(config, "num_experts", config["moe_intermediate_size"], pattern),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def _olmoe(config: Config) -> Fields:
    if config.get("clip_qkv") is not None:
        raise _Unsupported(f"key 'clip_qkv': {config['clip_qkv']}, which Megatron does not do")
    return {
        **_llama(config),
        **_experts(config, "num_experts", config["intermediate_size"]),
        "qk_layernorm": True,
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
    }


def _mixtral(config: Config) -> Fields:
    return {**_mistral(config), **_experts(config, "num_local_experts", config["intermediate_size"])}


def _gpt_oss(config: Config) -> Fields:
    return {
        **_decoder(config),
        **_experts(config, "num_local_experts", config["intermediate_size"]),
        "activation_func": "quick_gelu",
        "add_bias_linear": config["attention_bias"],
        "add_qkv_bias": config["attention_bias"],
        **_alternating_window(config, config["layer_types"]),
        "softmax_type": "learnable",
        "moe_router_load_balancing_type": "none",
    }


def _glm4_moe(config: Config) -> Fields:
    return {
        **_decoder(config),
        **_deepseek_experts(config),
        **_balanced_sigmoid_router(config),
        "add_qkv_bias": config.get("attention_bias", False),
        "qk_layernorm": config.get("use_qk_norm", False),
    }


def _deepseek_v3(config: Config) -> Fields:
    if config.get("topk_method", "noaux_tc") != "noaux_tc":
        raise _Unsupported(f"key 'topk_method': {config['topk_method']!r}, where DeepSeek-V3 has 'noaux_tc'")
    return {**_latent_attention(config), **_deepseek_experts(config), **_balanced_sigmoid_router(config)}


def _deepseek_v2(config: Config) -> Fields:
    return {
        **_latent_attention(config),
        **_deepseek_experts(config),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "seq_aux_loss" if config.get("seq_aux", True) else "aux_loss",
    }


def _balanced_sigmoid_router(config: Config) -> Fields:
    """DeepSeek-V3's router: a bias an expert balances the choice, and weighs nothing in the output."""
    if not config.get("norm_topk_prob", True):
        raise _Unsupported(
            "key 'norm_topk_prob': false, where Megatron always normalises a sigmoid router's weights"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
    }


def _latent_attention(config: Config) -> Fields:
    return {
        **_decoder(config),
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
    """DeepSeek's and GLM's experts: dense layers first, shared experts, groups; the prediction layers too."""
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    pattern = [n >= first and n % step == 0 for n in range(config["num_hidden_layers"])]
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


def _experts(config: Config, count_key: str, width: int, pattern: list[bool] | None = None) -> Fields:
    """The routed experts; `pattern` says which layers have them, all by default."""
    fields = {
        "num_moe_experts": config[count_key],
        "moe_ffn_hidden_size": width,
        "moe_router_topk": config["num_experts_per_tok"],
    }
    return (
        fields
        if pattern is None or all(pattern)
        else {**fields, "moe_layer_freq": [int(moe) for moe in pattern]}
    )


FAMILIES: Mapping[str, Callable[[Config], Fields]] = MappingProxyType(
    {
        "LlamaForCausalLM": _llama,
        "MistralForCausalLM": _mistral,
        "MixtralForCausalLM": _mixtral,
        "GemmaForCausalLM": _gemma,
        "Gemma2ForCausalLM": _gemma2,
        "Gemma3ForCausalLM": _gemma3,
        "Gemma3ForConditionalGeneration": _text_model(_gemma3),
        "NemotronForCausalLM": _nemotron,
        "Qwen2ForCausalLM": _qwen2,
        "Qwen2MoeForCausalLM": _qwen2_moe,
        "Qwen3ForCausalLM": _qwen3,
        "Qwen3MoeForCausalLM": _qwen3_moe,
        "Qwen3VLForConditionalGeneration": _text_model(_qwen3),
        "Qwen3VLMoeForConditionalGeneration": _text_model(_qwen3_moe),
        "OlmoeForCausalLM": _olmoe,
        "GptOssForCausalLM": _gpt_oss,
        "GlmForCausalLM": _glm,
        "Glm4ForCausalLM": _glm4,
        "Glm4MoeForCausalLM": _glm4_moe,
        "DeepseekV2ForCausalLM": _deepseek_v2,
        "DeepseekV3ForCausalLM": _deepseek_v3,
        "KimiK25ForConditionalGeneration": _text_model(_deepseek_v3),
    }
)
"""The known model classes, and how each one's file is read."""

_LINEAR = "most layers have linear attention (a gated delta rule)"
_SPARSE = "attention looks up its keys by an index of its own"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "NemotronHForCausalLM": "its layers are of Mamba, attention or an MLP by turns",
        "DeciLMForCausalLM": "its layers differ in width, and some have no attention",
        "Qwen3NextForCausalLM": _LINEAR,
        "Qwen3_5ForConditionalGeneration": _LINEAR,
        "Qwen3_5MoeForConditionalGeneration": _LINEAR,
        "DeepseekV32ForCausalLM": _SPARSE,
        "DeepseekV4ForCausalLM": _SPARSE,
        "GlmMoeDsaForCausalLM": _SPARSE,
        "Gemma4ForConditionalGeneration": "its layers with full attention have wider heads, and fewer of them",
        "Llama4ForConditionalGeneration": "most layers attend within chunks, and the others have no positions",
        "Olmo2ForCausalLM": "it has norms behind attention and MLP alone",
        "Olmo3ForCausalLM": "it has norms behind attention and MLP alone",
    }
)
"""Model classes that no field of `Model` makes out of a decoder, each with the reason."""
