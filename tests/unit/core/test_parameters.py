"""The shipped models have the sizes that their makers publish."""

from dataclasses import dataclass, replace
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.loader import load_model, model_names
from tuner.core.parameters import (
    active_parameters,
    attention,
    dense_mlp,
    embedding,
    expert,
    layer,
    mtp_layers,
    norm,
    output,
    router,
    shared_experts,
    total_parameters,
)
from tuner.core.workload import Model


class Count(Protocol):
    """A function that counts parameters of a model."""

    __name__: str

    def __call__(self, model: Model) -> int: ...


@dataclass(frozen=True, slots=True)
class PublishedSize:
    """A size that the publisher of a model states."""

    model: str
    """Name of the model."""
    count: Count
    """Our count of the parameters that the publisher counts."""
    billions: float
    """The published size in billions of parameters."""
    source: str
    """Where the size is published."""
    digits: int = 0
    """Digits after the decimal point of a size that is rounded."""


def total_without_embeddings(model: Model) -> int:
    return total_parameters(model) - embedding(model) - output(model)


def total_on_the_hub(model: Model) -> int:
    """Return the parameters in GLM's repositories, which hold the MTP layer with copies of both embeddings."""
    return total_parameters(model) + mtp_layers(model) + embedding(model) + output(model)


def total_with_mtp_without_embeddings(model: Model) -> int:
    return total_without_embeddings(model) + mtp_layers(model)


def active_without_look_up(model: Model) -> int:
    return active_parameters(model) - embedding(model)


def active_without_embeddings(model: Model) -> int:
    return active_parameters(model) - embedding(model) - output(model)


# Sizes with enough digits for a tolerance of 1%.
PUBLISHED = [
    PublishedSize("gpt3-175b", total_parameters, 174.6, "arXiv:2005.14165, table D.1"),
    PublishedSize("llama3-8b", total_parameters, 8.03, "Hugging Face, safetensors total"),
    PublishedSize("llama3-70b", total_parameters, 70.6, "Hugging Face, safetensors total"),
    PublishedSize("llama3.1-405b", total_parameters, 405.0, "model card"),
    PublishedSize("llama3.2-1b", total_parameters, 1.23, "model card"),
    PublishedSize("gemma2-9b", total_without_embeddings, 8.324, "arXiv:2408.00118, table 2, non-embedding"),
    PublishedSize("gemma2-9b", embedding, 0.918, "arXiv:2408.00118, table 2, embedding"),
    PublishedSize("gemma3-27b", total_without_embeddings, 25.6, "arXiv:2503.19786, table 1, non-embedding"),
    PublishedSize("gemma3-27b", embedding, 1.416, "arXiv:2503.19786, table 1, embedding"),
    PublishedSize("gemma3-27b", total_parameters, 27.0, "model card"),
    PublishedSize("gemma2-9b", total_parameters, 9.24, "Hugging Face, safetensors total"),
    PublishedSize("nemotron4-340b", total_without_embeddings, 331.6, "arXiv:2406.11704, section 2.1"),
    PublishedSize(
        "nemotron4-340b", total_parameters, 341.0, "arXiv:2406.11704, section 2.1: 9.4 of embeddings on top"
    ),
    PublishedSize("qwen2.5-7b", total_parameters, 7.61, "model card"),
    PublishedSize("qwen2.5-7b", total_without_embeddings, 6.53, "model card, non-embedding"),
    PublishedSize("qwen3-0.6b", total_parameters, 0.6, "model card"),
    PublishedSize("qwen3-0.6b", total_without_embeddings, 0.44, "model card, non-embedding"),
    PublishedSize("qwen3-1.7b", total_without_embeddings, 1.4, "model card, non-embedding"),
    PublishedSize("qwen3-4b", total_parameters, 4.0, "model card"),
    PublishedSize("qwen3-4b", total_without_embeddings, 3.6, "model card, non-embedding"),
    PublishedSize("qwen3-8b", total_parameters, 8.2, "model card"),
    PublishedSize("qwen3-8b", total_without_embeddings, 6.95, "model card, non-embedding"),
    PublishedSize("qwen3-14b", total_parameters, 14.8, "model card"),
    PublishedSize("qwen3-14b", total_without_embeddings, 13.2, "model card, non-embedding"),
    PublishedSize("qwen3-32b", total_parameters, 32.8, "model card"),
    PublishedSize("qwen3-32b", total_without_embeddings, 31.2, "model card, non-embedding"),
    PublishedSize("qwen3-30b-a3b", total_parameters, 30.5, "model card"),
    PublishedSize("qwen3-30b-a3b", total_without_embeddings, 29.9, "model card, non-embedding"),
    PublishedSize("qwen3-235b-a22b", total_parameters, 235.0, "model card"),
    PublishedSize("qwen3-235b-a22b", total_without_embeddings, 234.0, "model card, non-embedding"),
    PublishedSize("qwen3-235b-a22b", active_parameters, 22.0, "model card"),
    PublishedSize("mixtral-8x7b", total_parameters, 46.7, "mistral.ai/news/mixtral-of-experts"),
    PublishedSize("mixtral-8x7b", active_parameters, 12.9, "mistral.ai/news/mixtral-of-experts"),
    PublishedSize("mixtral-8x22b", total_parameters, 141.0, "mistral.ai/news/mixtral-8x22b"),
    PublishedSize("mixtral-8x22b", active_parameters, 39.0, "mistral.ai/news/mixtral-8x22b"),
    PublishedSize("gpt-oss-20b", total_parameters, 20.91, "OpenAI gpt-oss model card, table 1"),
    PublishedSize("gpt-oss-20b", active_without_look_up, 3.61, "OpenAI gpt-oss model card, table 1"),
    PublishedSize("gpt-oss-120b", total_parameters, 116.83, "OpenAI gpt-oss model card, table 1"),
    PublishedSize("gpt-oss-120b", active_without_look_up, 5.13, "OpenAI gpt-oss model card, table 1"),
    PublishedSize("olmoe-7b", total_parameters, 6.9, "arXiv:2409.02060, table 1"),
    PublishedSize("olmoe-7b", total_parameters, 6.92, "Hugging Face, safetensors total"),
    PublishedSize("moonlight-16b", total_without_embeddings, 15.29, "arXiv:2502.16982, excluding embeddings"),
    PublishedSize("moonlight-16b", active_without_embeddings, 2.24, "arXiv:2502.16982, excluding embeddings"),
    PublishedSize("deepseek-v2", total_parameters, 236.0, "arXiv:2405.04434"),
    PublishedSize("deepseek-v3", total_parameters, 671.0, "arXiv:2412.19437; the MTP layer comes on top"),
    # README_WEIGHTS.md says both embeddings are in, which would make 37.6.
    PublishedSize("deepseek-v3", active_without_look_up, 36.7, "DeepSeek-V3, README_WEIGHTS.md"),
    PublishedSize("deepseek-v3", mtp_layers, 11.5, "DeepSeek-V3, README_WEIGHTS.md, unique parameters"),
    # The report's 1.04T is 1.3% above the sum over its own shapes; the published weights are that sum.
    PublishedSize(
        "kimi-k2", total_parameters, 1026.0, "Hugging Face, moonshotai/Kimi-K2-Base, safetensors total"
    ),
    PublishedSize("kimi-k2", active_parameters, 32.6, "arXiv:2507.20534, table 2"),
    PublishedSize(
        "glm-4.5", total_with_mtp_without_embeddings, 355.0, "arXiv:2508.06471, table 1 and its note"
    ),
    PublishedSize("glm-4.5", total_on_the_hub, 358.0, "Hugging Face, safetensors total"),
    PublishedSize("glm-4.5", active_without_embeddings, 32.0, "arXiv:2508.06471, table 1"),
    PublishedSize(
        "glm-4.5-air",
        total_without_embeddings,
        106.0,
        "arXiv:2508.06471, table 1; its note would count MTP: 108",
    ),
    PublishedSize("glm-4.5-air", total_on_the_hub, 110.0, "Hugging Face, safetensors total"),
]

# Sizes with too few digits for 1%: the count must round to the published size.
ROUNDED = [
    PublishedSize("qwen3-1.7b", total_parameters, 1.7, "model card", digits=1),
    PublishedSize("olmoe-7b", active_parameters, 1.3, "arXiv:2409.02060, table 1", digits=1),
    PublishedSize("deepseek-v2", active_parameters, 21, "arXiv:2405.04434", digits=0),
    PublishedSize("deepseek-v3", active_without_look_up, 37, "arXiv:2412.19437", digits=0),
    PublishedSize("kimi-k2", active_without_look_up, 32, "model card", digits=0),
    PublishedSize("glm-4.5-air", active_without_embeddings, 12, "arXiv:2508.06471, table 1", digits=0),
]


def label(size: PublishedSize) -> str:
    """Return a name for the test of a size."""
    return f"{size.model}-{size.count.__name__}"


@pytest.mark.parametrize("size", PUBLISHED, ids=label)
def test_a_size_is_within_one_percent_of_the_published_size(size: PublishedSize) -> None:
    assert size.count(load_model(size.model)) / 1e9 == pytest.approx(size.billions, rel=0.01), size.source


@pytest.mark.parametrize("size", ROUNDED, ids=label)
def test_a_size_rounds_to_the_published_size(size: PublishedSize) -> None:
    assert round(size.count(load_model(size.model)) / 1e9, size.digits) == size.billions, size.source


def test_qwen3_30b_has_the_active_size_of_its_card_which_cuts_digits_off() -> None:
    assert int(active_parameters(load_model("qwen3-30b-a3b")) / 1e8) == 33


@pytest.mark.parametrize("name", [name for name in model_names() if not name.startswith("tiny-")])
def test_every_shipped_model_is_compared_in_total_and_if_sparse_in_active_size(name: str) -> None:
    sizes = [size for size in (*PUBLISHED, *ROUNDED) if size.model == name]
    compared = {size.count.__name__.split("_")[0] for size in sizes}
    if name == "qwen3-30b-a3b":
        compared.add("active")  # another test compares it
    assert {"total", "active"} <= compared if load_model(name).is_moe else "total" in compared


def test_counts_equal_the_published_weights_to_the_last_parameter() -> None:
    # Hugging Face counts the correction bias of the router, one per routed expert and layer; here it is a buffer.
    deepseek, kimi = load_model("deepseek-v3"), load_model("kimi-k2")
    assert total_parameters(deepseek) + 58 * 256 == 671_026_419_200
    assert total_parameters(kimi) + 60 * 384 == 1_026_408_232_448
    assert total_parameters(load_model("llama3-8b")) == 8_030_261_248
    assert total_parameters(load_model("mixtral-8x7b")) == 46_702_792_704
    assert total_parameters(load_model("qwen3-30b-a3b")) == 30_532_122_624


@st.composite
def models(draw: st.DrawFn) -> Model:
    groups = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 8))
    shared = draw(st.none() | st.integers(1, 64))
    layers = draw(st.integers(1, 5))
    return Model(
        name="drawn",
        num_layers=layers,
        hidden_size=draw(st.integers(1, 64)),
        ffn_hidden_size=draw(st.integers(1, 64)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        kv_channels=draw(st.integers(1, 16)),
        vocab_size=draw(st.integers(1, 100)),
        gated_linear_unit=draw(st.booleans()),
        add_bias_linear=draw(st.booleans()),
        share_embeddings_and_output_weights=draw(st.booleans()),
        num_moe_experts=experts,
        moe_ffn_hidden_size=draw(st.integers(1, 64)),
        moe_router_topk=draw(st.integers(1, experts)),
        sandwich_layernorm=draw(st.booleans()),
        moe_shared_expert_intermediate_size=shared,
        moe_shared_expert_gate=shared is not None and draw(st.booleans()),
        moe_layer_freq=tuple(draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))),
    )


@given(models())
def test_the_total_is_the_sum_of_the_modules(model: Model) -> None:
    pattern = model.moe_layer_pattern()
    sparse = router(model) + shared_experts(model).total + (model.num_moe_experts or 0) * expert(model).total
    mlps = sum(sparse if moe else dense_mlp(model).total for moe in pattern)
    norms = 4 if model.sandwich_layernorm else 2
    attentions = model.num_layers * (attention(model).total + norms * norm(model))
    assert total_parameters(model) == attentions + mlps + norm(model) + embedding(model) + output(model)


@given(models())
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit(model: Model) -> None:
    idle = (model.num_moe_experts or 0) - (model.moe_router_topk or 0)
    unused = sum(model.moe_layer_pattern()) * idle * expert(model).total
    assert active_parameters(model) == total_parameters(model) - unused


@given(models())
def test_a_gate_of_shared_experts_has_one_weight_per_hidden_element(model: Model) -> None:
    gates = sum(model.moe_layer_pattern()) * model.hidden_size if model.moe_shared_expert_gate else 0
    assert total_parameters(model) - total_parameters(replace(model, moe_shared_expert_gate=False)) == gates


def test_a_prediction_layer_is_a_layer_of_the_last_kind_with_three_norms_and_a_projection() -> None:
    model = load_model("tiny-mla")
    assert mtp_layers(model) == layer(model, moe=True) + 3 * 128 + 2 * 128 * 128
    assert mtp_layers(load_model("tiny-moe")) == 0
