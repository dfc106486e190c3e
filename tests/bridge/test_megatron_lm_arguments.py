"""Megatron-LM's own parser and validation take our arguments, and read them as the layout says."""

import os
import shlex
from dataclasses import fields
from random import Random
from types import SimpleNamespace

import pytest
import torch
from megatron.training.arguments import parse_args, validate_args

from search_spaces.loader import load_cluster, load_model
from tests.bridge.layouts import drawn
from tests.bridge.writing import written
from tuner.environment import cuda_environment
from tuner.export import Format, megatron_value
from tuner.layout import MOE_KNOBS, Layout
from tuner.space import default_domain
from tuner.workload import Model, Workload


def _model_arguments(model: Model) -> list[str]:
    """The part of a command line that states the model."""
    words: list[object] = [
        *("--num-layers", model.num_layers, "--hidden-size", model.hidden_size),
        *("--ffn-hidden-size", model.ffn_hidden_size, "--num-attention-heads", model.num_attention_heads),
        *("--group-query-attention", "--num-query-groups", model.num_query_groups),
        *("--kv-channels", model.kv_channels, "--swiglu", "--normalization", model.normalization),
        *("--max-position-embeddings", 8192, "--position-embedding-type", "rope"),
        *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    ]
    if model.is_moe:
        words += ["--num-experts", model.num_moe_experts, "--moe-router-topk", model.moe_router_topk]
        words += ["--moe-ffn-hidden-size", model.moe_ffn_hidden_size]
    return [str(word) for word in words]


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "qwen3-32b", "mixtral-8x7b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("seed", range(4))
def test_megatron_lm_reads_the_arguments_as_the_layout(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(model=load_model(name), seq_length=4096, global_batch_size=512)
    cluster = load_cluster("dgx-h100", nodes=4)
    layout = drawn(workload, cluster, default_domain(workload, cluster), Random(f"{name}{seed}"))
    monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": "32", "RANK": "0"})
    for variable, value in cuda_environment(layout, cluster).items():
        monkeypatch.setitem(os.environ, variable, value)
    device = SimpleNamespace(major=9, minor=0, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    text = written(Format.MEGATRON_LM, workload, cluster, layout)
    training = ["--seq-length", "4096", "--bf16", "--train-iters", "10", "--lr", "1e-4", "--mock-data"]
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(workload.model.vocab_size)]
    words = shlex.split(text.replace(" \\\n", " "), comments=True)
    command = ["pretrain_gpt.py", *_model_arguments(workload.model), *training, *tokenizer, *words]
    monkeypatch.setattr("sys.argv", command)
    arguments = parse_args()
    validate_args(arguments)
    assert arguments.global_batch_size == 512
    read = {knob.name: getattr(arguments, _name(knob.metadata["megatron"])) for knob in fields(Layout)}
    for knob, value in read.items():
        if knob not in MOE_KNOBS or workload.model.is_moe:
            assert value == megatron_value(knob, getattr(layout, knob)) or _default(knob, value, layout), knob


def _name(path: str) -> str:
    """Megatron-LM's own name of a field, where it is another."""
    field = path.partition(".")[2]
    others = {
        "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
        "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    }
    return others.get(field, field)


def _default(knob: str, value: object, layout: Layout) -> bool:
    """Whether Megatron-LM has put its default where the layout states none."""
    defaults = {
        "microbatch_group_size_per_vp_stage": layout.pp,
        "recompute_modules": ["core_attn"],
    }
    return value == defaults.get(knob, ...) and megatron_value(knob, getattr(layout, knob)) is None
