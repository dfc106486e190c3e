"""A Hugging Face config becomes the model, or is refused with the reason."""

from typing import Any

import pytest

from search_spaces.loader import load_model
from tuner.core.parameters import total_parameters
from tuner.errors import InputError
from tuner.files import to_data
from tuner.frameworks.huggingface.config import FAMILIES, REFUSED, model_from_config

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}

# The config.json of models whose files are in no package, from their pages on Hugging Face.
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}

GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}

DEEPSEEK_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


GEMMA_2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "model_type": "gemma2",
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}

GEMMA_3: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}

NEMOTRON: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"],
    "attention_bias": False,
    "head_dim": 192,
    "hidden_act": "relu2",
    "hidden_size": 18432,
    "intermediate_size": 73728,
    "mlp_bias": False,
    "model_type": "nemotron",
    "norm_eps": 1e-05,
    "num_attention_heads": 96,
    "num_hidden_layers": 96,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "vocab_size": 256000,
}

QWEN_2_5: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

QWEN_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

GLM_4: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "model_type": "glm4",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
}

GEMMA_1: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "model_type": "gemma",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}

# Parameters of the class in transformers 5.12.1, built from the file on the meta device (measured).
COUNTED = [
    (GEMMA_1, 8_537_680_896),
    (GEMMA_2, 9_241_705_984),
    (GEMMA_3, 27_009_346_304),
    (NEMOTRON, 341_029_195_776),
    (GLM_4, 9_400_279_040),
    (QWEN_MOE, 14_315_784_192),
    (QWEN_2_5, 7_615_616_512),
]


def without_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name"}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (OLMOE, "olmoe-7b"),
        (GLM, "glm-4.5-air"),
        (DEEPSEEK_V2, "deepseek-v2"),
        (GEMMA_2, "gemma2-9b"),
        (GEMMA_3, "gemma3-27b"),
        (NEMOTRON, "nemotron4-340b"),
        (QWEN_2_5, "qwen2.5-7b"),
    ],
)
def test_a_config_reads_as_the_built_in_model(config: dict[str, Any], name: str) -> None:
    read, built_in = model_from_config(config, "config.json"), load_model(name)
    assert without_name(to_data(read)) == without_name(to_data(built_in))


@pytest.mark.parametrize(("config", "parameters"), COUNTED, ids=lambda value: str(value)[18:40])
def test_a_config_has_exactly_the_parameters_of_its_class(config: dict[str, Any], parameters: int) -> None:
    assert total_parameters(model_from_config(config, "config.json")) == parameters


def test_gemma_3_slides_in_five_of_six_layers_and_has_the_defaults_of_its_class() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    model = model_from_config({**GEMMA_3, "text_config": text}, "gemma-3-4b/config.json")
    assert (model.window_size, model.window_attn_skip_freq) == ((1023, 0), 6)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (8, 4, 256)
    assert (model.vocab_size, model.rotary_base) == (262208, 1000000)
    assert model.share_embeddings_and_output_weights
    assert model.attn_logit_softcapping is None
    assert total_parameters(model) == 3_880_263_168  # as COUNTED


def test_newer_files_of_gemma_state_base_and_kind_per_kind_of_layer() -> None:
    bases = {"full_attention": {"rope_theta": 500000.0}, "sliding_attention": {"rope_theta": 10000.0}}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = {**GEMMA_3["text_config"], "num_hidden_layers": 6, "rope_parameters": bases, "layer_types": kinds}
    model = model_from_config({**GEMMA_3, "text_config": text}, "config.json")
    assert (model.rotary_base, model.window_attn_skip_freq) == (500000, 3)


def test_gemma_without_a_bound_on_its_scores_reads_as_unbounded() -> None:
    model = model_from_config({**GEMMA_2, "attn_logit_softcapping": None}, "config.json")
    assert (model.attn_logit_softcapping, model.final_logit_softcapping) == (None, 30.0)


def test_nemotron_squares_an_ungated_relu_between_layer_norms() -> None:
    model = model_from_config(NEMOTRON, "config.json")
    assert (model.activation_func, model.gated_linear_unit) == ("squared_relu", False)
    assert model.normalization == "LayerNorm"


def test_qwen2_moe_gates_its_shared_experts() -> None:
    model = model_from_config(QWEN_MOE, "config.json")
    assert (model.moe_shared_expert_intermediate_size, model.moe_shared_expert_gate) == (5632, True)
    assert (model.moe_router_pre_softmax, model.add_qkv_bias) == (True, True)


def test_glm_4_has_a_norm_behind_each_part_of_a_layer() -> None:
    model = model_from_config(GLM_4, "config.json")
    assert (model.sandwich_layernorm, model.add_qkv_bias, model.qk_layernorm) == (True, True, False)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_an_architecture_that_no_field_can_state_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(InputError) as error:
        model_from_config({**DENSE, "architectures": [family]}, "config.json")
    message = str(error.value)
    assert f"cannot read {family}: {REFUSED[family]}" in message
    assert all(known in message for known in FAMILIES)
    assert "by hand" not in message


def test_the_model_is_named_after_its_folder_or_file() -> None:
    assert model_from_config(DENSE, "models/Llama-3-8B/config.json").name == "llama-3-8b"
    assert model_from_config(DENSE, "models/My-Llama.json").name == "my-llama"


def test_heads_default_to_the_hidden_size_and_to_no_grouping() -> None:
    bare = {key: value for key, value in DENSE.items() if key != "num_key_value_heads"}
    model = model_from_config(bare, "config.json")
    assert (model.kv_channels, model.num_query_groups) == (8, 8)
    assert model_from_config({**DENSE, "head_dim": 32}, "config.json").kv_channels == 32


def test_the_rotary_base_of_newer_files_is_read() -> None:
    newer = {**DENSE, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    assert model_from_config(newer, "config.json").rotary_base == 500000


def test_qwen2_biases_its_queries_keys_and_values() -> None:
    qwen = {
        **DENSE,
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": 4096,
    }
    model = model_from_config(qwen, "config.json")
    assert (model.add_qkv_bias, model.qk_layernorm, model.window_size) == (True, False, None)


def test_mistrals_window_counts_the_token_itself() -> None:
    mistral = {**DENSE, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert model_from_config(mistral, "config.json").window_size == (4095, 0)


def test_the_layers_that_qwen3_moe_names_stay_dense() -> None:
    qwen = {
        **DENSE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    }
    assert model_from_config(qwen, "config.json").moe_layer_freq == (0, 0, 0, 1)


def test_an_unknown_architecture_is_refused_with_the_known_ones_and_a_remedy() -> None:
    with pytest.raises(InputError) as error:
        model_from_config({**DENSE, "architectures": ["MambaForCausalLM"]}, "mamba/config.json")
    message = str(error.value)
    assert "mamba/config.json" in message
    assert "MambaForCausalLM" in message
    assert all(family in message for family in FAMILIES)
    assert "`model:`" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "cannot read a file without it"),
        ({"hidden_act": "relu"}, "key 'hidden_act': 'relu'"),
        ({"attention_bias": True}, "'attention_bias' and 'mlp_bias' differ"),
        ({"sliding_window": 128}, "key 'sliding_window': 128"),
        ({"num_attention_heads": "eight"}, "holds a value that LlamaForCausalLM cannot have"),
        ({"num_attention_heads": 0}, "holds a value that LlamaForCausalLM cannot have"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_query_groups"),
        ({"architectures": ["OlmoeForCausalLM"], "clip_qkv": 8.0}, "key 'clip_qkv': 8.0"),
        ({"architectures": ["OlmoeForCausalLM"]}, "missing key 'num_experts'"),
        ({**NEMOTRON, "mlp_bias": True}, "keys 'attention_bias' and 'mlp_bias'"),
        ({**NEMOTRON, "hidden_act": "silu"}, "'silu', where only 'relu2' can be read"),
        ({**GEMMA_2, "hidden_activation": "gelu"}, "key 'hidden_activation': 'gelu'"),
        ({**GEMMA_2, "attention_bias": True}, "key 'attention_bias': true"),
        ({**GEMMA_2, "layer_types": ["full_attention"] + ["sliding_attention"] * 41}, "key 'layer_types'"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "bidirectional"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "missing key 'text_config'"),
    ],
)
def test_a_value_that_cannot_be_stated_is_refused_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_from_config({**DENSE, **changes}, "config.json")


def test_a_file_that_holds_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match="holds no mapping"):
        model_from_config(["LlamaForCausalLM"], "config.json")
