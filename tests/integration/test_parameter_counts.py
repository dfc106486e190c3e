"""The counted parameters equal those of the modules that Megatron-Core builds."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest

from search_spaces.loader import load_model, model_names
from tuner.core import parameters
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload

GPT2 = Model(
    name="gpt2-like",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=1000,
    gated_linear_unit=False,
    activation_func="gelu",
    normalization="LayerNorm",
    position_embedding_type="learned_absolute",
    max_position_embeddings=32,
    share_embeddings_and_output_weights=True,
    add_bias_linear=True,
    add_qkv_bias=True,
)

BIASED_EXPERTS = Model(
    name="gpt-oss-like",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=64,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=1000,
    add_bias_linear=True,
    add_qkv_bias=True,
    window_size=(7, 0),
    window_attn_skip_freq=2,
    num_moe_experts=4,
    moe_ffn_hidden_size=64,
    moe_router_topk=2,
)

GEMMA = replace(
    load_model("tiny-gpt"),
    name="gemma-like",
    activation_func="gelu",
    window_size=(7, 0),
    window_attn_skip_freq=2,
    share_embeddings_and_output_weights=True,
    sandwich_layernorm=True,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)

NEMOTRON = replace(
    load_model("tiny-gpt"),
    name="nemotron-like",
    activation_func="squared_relu",
    gated_linear_unit=False,
    normalization="LayerNorm",
)

MODELS = [
    load_model("tiny-gpt"),
    load_model("tiny-moe"),
    load_model("tiny-mla"),
    replace(load_model("tiny-mla"), name="direct-query", q_lora_rank=None, mtp_num_layers=2),
    replace(load_model("tiny-gpt"), name="qwen-like", add_qkv_bias=True, qk_layernorm=True),
    replace(load_model("tiny-moe"), name="every-other-layer", moe_layer_freq=2),
    replace(
        load_model("tiny-moe"),
        name="qwen2-moe-like",
        moe_shared_expert_intermediate_size=64,
        moe_shared_expert_gate=True,
    ),
    GPT2,
    BIASED_EXPERTS,
    GEMMA,
    NEMOTRON,
]


def count_on_rank_0(model: Model, layout: Layout, world_size: int) -> int:
    """Build rank 0's part of the model in a world whose other ranks do not exist, in a process of its own."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from launchers.programs.harness.cpu import enable_cpu
    from launchers.programs.megatron_core.config import transformer_config
    from launchers.programs.megatron_core.model import build_model, initialize_grids

    torch.set_num_threads(1)
    enable_cpu()
    distributed: Any = torch.distributed
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        workload = Workload(model=model, seq_length=32, global_batch_size=world_size, precision="fp32")
        config = transformer_config(workload, layout, "cpu")
        initialize_grids(workload, layout, config, seed=1)
        # Tensors without memory, so that models of any width fit; there is no random state to save.
        without_state = patch.object(CudaRNGStatesTracker, "fork", lambda *unused: nullcontext())
        with without_state, FakeTensorMode(allow_non_fake_inputs=True):
            (chunk,) = build_model(workload, layout, config)
        return sum(parameter.numel() for parameter in chunk.parameters())
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def builder() -> Iterator[ProcessPoolExecutor]:
    # One process imports Megatron for all cases, and keeps the patches of enable_cpu out of other tests.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


def shortened(model: Model) -> Model:
    """Return the model with 4 layers at full width."""
    frequency = model.moe_layer_freq
    return replace(
        model,
        num_layers=4,
        moe_layer_freq=frequency[:4] if isinstance(frequency, tuple) else frequency,
    )


SHIPPED = [shortened(load_model(name)) for name in model_names()]


@pytest.mark.parametrize("model", [*MODELS, *SHIPPED], ids=lambda model: model.name)
def test_a_built_model_has_the_counted_parameters_and_the_padding(
    builder: ProcessPoolExecutor, model: Model
) -> None:
    padding = (model.padded_vocab_size(1) - model.vocab_size) * model.hidden_size
    copies = 1 if model.share_embeddings_and_output_weights else 2
    counted = parameters.total_parameters(model) + parameters.mtp_layers(model) + copies * padding
    assert builder.submit(count_on_rank_0, model, Layout(), 1).result() == counted


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_tensor_parallel_rank_holds_its_shard_of_sharded_weights_and_all_others_whole(
    builder: ProcessPoolExecutor, model: Model
) -> None:
    layout = Layout(tp=2, sp=True)
    if model.is_moe:
        # Megatron refuses biased experts under expert tensor parallelism.
        layout = replace(layout, ep=2, etp=1 if model.add_bias_linear else 2)
    assert builder.submit(count_on_rank_0, model, layout, 4).result() == share_of_a_rank(model, layout)


def share_of_a_rank(model: Model, layout: Layout) -> int:
    def held(module: parameters.Parameters, ranks: int) -> int:
        return module.sharded // ranks + module.replicated

    def layer(moe: bool) -> int:
        rest = held(parameters.attention(model), layout.tp) + parameters.layer_norms(model)
        if not moe:
            return rest + held(parameters.dense_mlp(model), layout.tp)
        experts = (model.num_moe_experts or 0) // layout.ep * held(parameters.expert(model), layout.etp)
        shared = held(parameters.shared_experts(model), layout.tp)
        return rest + parameters.router(model) + shared + experts

    pattern = model.moe_layer_pattern()
    words = model.padded_vocab_size(layout.tp) // layout.tp * model.hidden_size
    words *= 1 if model.share_embeddings_and_output_weights else 2
    positions = model.max_position_embeddings * model.hidden_size
    predicting = 3 * parameters.norm(model) + 2 * model.hidden_size**2 // layout.tp + layer(pattern[-1])
    return (
        words
        + positions
        + sum(map(layer, pattern))
        + parameters.norm(model)
        + (model.mtp_num_layers or 0) * predicting
    )
