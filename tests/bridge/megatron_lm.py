"""What a command line means to Megatron-LM's own parser and validation, which run on a CPU."""

import os
from dataclasses import fields
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training.arguments import parse_args, validate_args

from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import ENVIRONMENT_KNOBS, MOE_KNOBS, Layout
from tuner.core.workload import Model, Workload


def command(workload: Workload) -> list[str]:
    """Return a command line that trains the workload; attention and MLP have the model's sizes, not its kinds."""
    text = (
        f"pretrain_gpt.py --seq-length {workload.seq_length} --bf16 --train-iters 10 --lr 1e-4 --mock-data "
        f"--tokenizer-type NullTokenizer --vocab-size {workload.model.vocab_size}"
    )
    return [*text.split(), *map(str, _model_arguments(workload.model))]


def _model_arguments(model: Model) -> list[object]:
    text = (
        f"--num-layers {model.num_layers} --hidden-size {model.hidden_size} "
        f"--ffn-hidden-size {model.ffn_hidden_size} --num-attention-heads {model.num_attention_heads} "
        f"--group-query-attention --num-query-groups {model.num_query_groups} "
        f"--kv-channels {model.kv_channels} --swiglu --normalization RMSNorm "
        "--max-position-embeddings 131072 --position-embedding-type rope "
        "--disable-bias-linear --untie-embeddings-and-output-weights"
    )
    words: list[object] = [*text.split()]
    if model.mtp_num_layers:
        words += ["--mtp-num-layers", model.mtp_num_layers]
    if model.is_moe:
        words += ["--num-experts", model.num_moe_experts, "--moe-router-topk", model.moe_router_topk]
        words += ["--moe-ffn-hidden-size", model.moe_ffn_hidden_size]
        if isinstance(model.moe_layer_freq, tuple):
            runs = [(kind, len(list(run))) for kind, run in groupby(model.moe_layer_freq)]
            words += ["--moe-layer-freq", "+".join(f"[{kind}]*{count}" for kind, count in runs)]
    return words


def parsed(words: list[str], layout: Layout, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the arguments as Megatron-LM has them in a job of the layout on the cluster."""
    monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": str(cluster.world_size), "RANK": "0"})
    for variable, value in cuda_environment(layout, cluster).items():
        monkeypatch.setitem(os.environ, variable, value)
    generation = 9 if "H" in cluster.gpu.name else 10
    device = SimpleNamespace(major=generation, minor=0, name=cluster.gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (generation, 0))
    monkeypatch.setattr("sys.argv", words)
    arguments = parse_args()
    validate_args(arguments)
    return arguments


_NAMES = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
"""Megatron-LM's names of the fields that have another name in Megatron-Core."""


def layout_of(arguments: Any) -> Layout:
    """Return the layout that validated arguments select; Megatron-LM has filled in its defaults."""
    values: dict[str, Any] = {}
    for knob in fields(Layout):
        field = knob.metadata["megatron"].partition(".")[2]
        dense = knob.name in MOE_KNOBS and arguments.num_experts is None
        if knob.name in ENVIRONMENT_KNOBS or dense:
            continue
        value = getattr(arguments, _NAMES.get(field, field))
        values[knob.name] = knob.default if value is None else value
    modules = values["recompute_modules"]
    selective = values["recompute_granularity"] == "selective" and modules not in (["core_attn"], "none")
    values["recompute_modules"] = "+".join(modules) if selective else "none"
    values["cuda_graph_scope"] = "+".join(module.name for module in arguments.cuda_graph_modules) or "none"
    if values["cuda_graph_impl"] == "full_iteration":
        values |= {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
    values["cp_comm_type"] = arguments.cp_comm_type[0]
    if values["microbatch_group_size_per_vp_stage"] == values["pp"]:
        values["microbatch_group_size_per_vp_stage"] = 0
    if not arguments.use_megatron_fsdp:
        values["data_parallel_sharding_strategy"] = "no_shard"
    return Layout(**values)
