"""A Hugging Face config becomes the model, or is refused with the reason."""

from typing import Any

import pytest

from search_spaces.loader import load_model
from tuner.errors import InputError
from tuner.files import to_data
from tuner.huggingface import FAMILIES, model_from_config

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

# The config.json of models whose files no package carries, as on their pages on Hugging Face.
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


def without_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name"}


@pytest.mark.parametrize(
    ("config", "name"), [(OLMOE, "olmoe-7b"), (GLM, "glm-4.5-air"), (DEEPSEEK_V2, "deepseek-v2")]
)
def test_a_config_reads_as_the_built_in_model(config: dict[str, Any], name: str) -> None:
    read, built_in = model_from_config(config, "config.json"), load_model(name)
    assert without_name(to_data(read)) == without_name(to_data(built_in))


def test_the_model_is_named_after_its_folder_or_file() -> None:
    assert model_from_config(DENSE, "models/Llama-3-8B/config.json").name == "llama-3-8b"
    assert model_from_config(DENSE, "models/My-Llama.json").name == "my-llama"


def test_heads_default_to_the_hidden_size_and_to_no_grouping() -> None:
    bare = {key: value for key, value in DENSE.items() if key != "num_key_value_heads"}
    model = model_from_config(bare, "config.json")
    assert (model.kv_channels, model.num_query_groups) == (8, 8)
    assert model_from_config({**DENSE, "head_dim": 32}, "config.json").kv_channels == 32


def test_the_rotary_base_is_found_where_newer_files_keep_it() -> None:
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


def test_qwen3_moe_keeps_the_layers_dense_that_it_names() -> None:
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


def test_an_unknown_architecture_is_refused_with_the_known_ones_and_the_way_by_hand() -> None:
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
    ],
)
def test_what_cannot_be_stated_is_refused_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_from_config({**DENSE, **changes}, "config.json")


def test_a_file_that_holds_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match="holds no mapping"):
        model_from_config(["LlamaForCausalLM"], "config.json")
