"""The shipped models are found, have the names of their files, and have the published shapes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces.loader import load_model, model_names
from tuner.core.workload import Model
from tuner.errors import InputError
from tuner.files import to_data

SHAPES = Path(__file__).parents[4] / "shared" / "data" / "model_shapes.json"

HUB_IDS = {
    "deepseek-v2": "deepseek-ai/DeepSeek-V2",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "gemma2-9b": "google/gemma-2-9b",
    "gemma3-27b": "google/gemma-3-27b-it",
    "glm-4.5": "zai-org/GLM-4.5",
    "glm-4.5-air": "zai-org/GLM-4.5-Air",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "gpt3-175b": "megatron/gpt3-175b",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-405b": "meta-llama/Meta-Llama-3.1-405B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "moonlight-16b": "moonshotai/Moonlight-16B-A3B",
    "nemotron4-340b": "nvidia/Nemotron-4-340B-Base",
    "olmoe-7b": "allenai/OLMoE-1B-7B-0125",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
}

# Fields in which a published shape holds an untouched default of Megatron, a padded vocabulary, a value without use, or
# a window that counts the token itself.
NOT_COMPARED = {
    "deepseek-v2": {"qk_layernorm", "add_bias_linear", "kv_channels"},
    "deepseek-v3": {"kv_channels", "make_vocab_size_divisible_by"},
    "gemma2-9b": {"window_size"},
    "gemma3-27b": {"window_size", "qk_layernorm"},
    "gpt3-175b": {"vocab_size", "add_qkv_bias"},
    "kimi-k2": {"kv_channels", "make_vocab_size_divisible_by"},
    "moonlight-16b": {"vocab_size", "qk_layernorm", "add_bias_linear", "make_vocab_size_divisible_by"},
}


@pytest.mark.parametrize("name", model_names())
def test_a_built_in_model_is_named_after_its_file(name: str) -> None:
    assert load_model(name).name == name


@pytest.mark.parametrize("name", sorted(HUB_IDS))
def test_a_built_in_model_has_the_published_shape(name: str) -> None:
    if not SHAPES.exists():
        pytest.skip(f"the published shapes are not here: {SHAPES}")
    published = json.loads(SHAPES.read_text(encoding="utf-8"))[HUB_IDS[name]]
    ours = to_data(load_model(name))
    different = {key for key, value in published.items() if key in ours and ours[key] != value}
    assert different == NOT_COMPARED.get(name, set())


def test_every_built_in_model_but_our_own_tiny_ones_is_compared() -> None:
    assert {name for name in model_names() if not name.startswith("tiny-")} == set(HUB_IDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": True},
            "needs moe_shared_expert_intermediate_size",
        ),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be above 0, not 0.0"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping must be above 0, not -1.0"),
        ({"attn_logit_softcapping": 50.0, "softmax_type": "learnable"}, "needs softmax_type vanilla"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(load_model("tiny-moe"), **changes)


def test_a_model_is_read_from_the_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nnum_layers: 2\nhidden_size: 8\nffn_hidden_size: 8\nnum_attention_heads: 2\n"
        "num_query_groups: 2\nkv_channels: 4\nvocab_size: 16\n"
    )
    model = load_model(str(path))
    assert isinstance(model, Model)
    assert (model.name, model.num_layers) == ("mine", 2)


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        InputError, match=r"unknown model 'lama3-8b' \(did you mean 'llama3-8b'\?\).*tiny-gpt"
    ):
        load_model("lama3-8b")


def test_the_message_about_a_missing_file_has_its_path(tmp_path: Path) -> None:
    for name in ("none.yaml", "config.json"):
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            load_model(str(tmp_path / name))


def test_a_torn_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_model(str(path))
