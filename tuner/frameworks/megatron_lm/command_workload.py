"""Turns parsed arguments of Megatron-LM into a workload and its model.

The names and defaults come from Megatron-LM, megatron/training/arguments.py.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Final

from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Precision, Workload
from tuner.files import parse
from tuner.frameworks.megatron_lm.layer_pattern import read_pattern

_VOCABULARIES: Final[Mapping[str, int]] = {"GPT2BPETokenizer": 50257, "Llama3Tokenizer": 128256}
"""The vocabulary size of tokenizer types that determine it (published by OpenAI and Meta)."""


def workload_of(
    arguments: Namespace, layout: Layout, world_size: int, *, source: str, vocab_size: int | None
) -> Workload:
    """Return the workload that a Megatron-LM command trains.

    Args:
        arguments: The command's arguments, as parsed by `argument_parser`; the numbers of layers and heads and the
            hidden size must be stated.
        layout: The command's layout. If no global batch size is stated, it is one micro-batch per data-parallel rank.
        world_size: The number of GPUs.
        source: The name of the command in error messages; the model's name is derived from it.
        vocab_size: The number of tokens in the vocabulary; None takes it from the arguments.

    Raises:
        InputError: if an argument has a value that no Workload can have.
        ValueError: if the sequence length or the vocabulary size is missing.
    """
    seq_length = arguments.seq_length or arguments.encoder_seq_length
    if seq_length is None:
        raise ValueError("no --seq-length")
    dp = data_parallel_size(world_size, layout.tp, layout.pp, layout.cp)
    precision = _precision(arguments)
    data = {
        "model": _model(arguments, source, vocab_size),
        "seq_length": seq_length,
        "global_batch_size": arguments.global_batch_size or max(1, layout.micro_batch_size * dp),
        "precision": precision,
        "grad_reduce_in_fp32": arguments.accumulate_allreduce_grads_in_fp32
        or (precision != "fp16" and not arguments.grad_reduce_in_bf16),
        "fp8_param": arguments.fp8_param_gather and precision in {"fp8", "mxfp8"},
        "moe_router_force_load_balancing": arguments.moe_router_force_load_balancing,
    }
    return parse(Workload, data, source)


def _precision(arguments: Namespace) -> Precision:
    if arguments.fp4_format:
        return "nvfp4"
    if arguments.fp8_format:
        return "mxfp8" if arguments.fp8_recipe == "mxfp8" else "fp8"
    return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"


def _model(arguments: Namespace, source: str, vocab_size: int | None) -> dict[str, Any]:
    """Return the fields of Model as values by name, with Megatron-LM's defaults, which differ from Model's."""
    hidden, heads = arguments.hidden_size, arguments.num_attention_heads
    vocabulary = vocab_size or arguments.vocab_size or _VOCABULARIES.get(arguments.tokenizer_type or "")
    if vocabulary is None:
        raise ValueError(
            "the vocabulary size is not known: the command has no --vocab-size, and only the job can ask its "
            "tokenizer; state it with --vocab-size"
        )
    rotary = arguments.use_rotary_position_embeddings or arguments.position_embedding_type == "rope"
    position = "rope" if rotary else arguments.position_embedding_type or "learned_absolute"
    default_width = int(4 * hidden * 2 / 3 / 64) * 64 if arguments.swiglu else 4 * hidden
    model = {
        "name": re.sub(r"\W+", "-", source.rpartition("/")[2]).strip("-").lower() or "command",
        "num_layers": arguments.num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": arguments.ffn_hidden_size or default_width,
        "num_attention_heads": heads,
        "num_query_groups": arguments.num_query_groups or 1 if arguments.group_query_attention else heads,
        "kv_channels": arguments.kv_channels or hidden // heads,
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": arguments.make_vocab_size_divisible_by or 128,
        "gated_linear_unit": arguments.swiglu or arguments.quick_geglu,
        "activation_func": _activation(arguments),
        "normalization": arguments.normalization or "LayerNorm",
        "position_embedding_type": position,
        "max_position_embeddings": arguments.max_position_embeddings or 0
        if position == "learned_absolute"
        else 0,
        "rotary_base": int(float(arguments.rotary_base or 10000)),
        "share_embeddings_and_output_weights": not arguments.untie_embeddings_and_output_weights,
        "add_bias_linear": not arguments.disable_bias_linear,
        "add_qkv_bias": arguments.add_qkv_bias or not arguments.disable_bias_linear,
        "qk_layernorm": arguments.qk_layernorm,
        "window_size": _window(arguments.window_size),
        "window_attn_skip_freq": arguments.window_attn_skip_freq,
        "softmax_type": arguments.softmax_type or "vanilla",
        "mtp_num_layers": arguments.mtp_num_layers,
    }
    if arguments.multi_latent_attention:
        model |= _latent_attention(arguments)
    return model | _experts(arguments, model["ffn_hidden_size"]) if arguments.num_experts else model


def _activation(arguments: Namespace) -> str:
    if arguments.swiglu:
        return "silu"
    return "squared_relu" if arguments.squared_relu else "quick_gelu" if arguments.quick_geglu else "gelu"


def _latent_attention(arguments: Namespace) -> dict[str, Any]:
    """Return the fields of Model for multi-latent attention, with the defaults of Megatron-LM's `_add_mla_args`."""
    return {
        "multi_latent_attention": True,
        "num_query_groups": arguments.num_attention_heads,
        "q_lora_rank": arguments.q_lora_rank,
        "kv_lora_rank": arguments.kv_lora_rank or 32,
        "qk_head_dim": arguments.qk_head_dim or 128,
        "qk_pos_emb_head_dim": arguments.qk_pos_emb_head_dim or 64,
        "v_head_dim": arguments.v_head_dim or 128,
    }


def _experts(arguments: Namespace, dense_width: int) -> dict[str, Any]:
    scaling = arguments.moe_router_topk_scaling_factor
    return {
        "num_moe_experts": arguments.num_experts,
        "moe_ffn_hidden_size": arguments.moe_ffn_hidden_size or dense_width,
        "moe_router_topk": arguments.moe_router_topk or 2,
        "moe_shared_expert_intermediate_size": arguments.moe_shared_expert_intermediate_size,
        "moe_layer_freq": read_pattern(arguments.moe_layer_freq or "1"),
        "moe_router_load_balancing_type": arguments.moe_router_load_balancing_type or "aux_loss",
        "moe_router_score_function": arguments.moe_router_score_function or "softmax",
        "moe_router_pre_softmax": arguments.moe_router_pre_softmax,
        "moe_router_num_groups": arguments.moe_router_num_groups,
        "moe_router_group_topk": arguments.moe_router_group_topk,
        "moe_router_topk_scaling_factor": None if scaling is None else float(scaling),
        "moe_router_enable_expert_bias": arguments.moe_router_enable_expert_bias,
    }


def _window(text: str | None) -> list[int] | None:
    return None if text is None else [int(part) for part in text.strip("()").split(",")]
