"""Parses those arguments of Megatron-LM that state a model, a workload, a layout or the number of GPUs.

The names and types come from Megatron-LM, megatron/training/arguments.py. An argument that a command lacks is parsed as
None, or False for a flag without a value. `command_layout` and `command_workload` fill in Megatron-LM's defaults.
"""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Final

from tuner.core.layout import Layout

_WHOLE_NUMBERS: Final = (
    # the model
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_query_groups",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "window_attn_skip_freq",
    "mtp_num_layers",
    # its experts
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
    # its latent attention
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    # the workload
    "seq_length",
    "encoder_seq_length",
    "global_batch_size",
)
_TEXTS: Final = (
    "normalization",
    "position_embedding_type",
    "rotary_base",
    "window_size",
    "softmax_type",
    "moe_layer_freq",
    "moe_router_load_balancing_type",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "fp8_format",
    "fp8_recipe",
    "fp4_format",
    "tokenizer_type",
)
_SWITCHES: Final = (
    "group_query_attention",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "untie_embeddings_and_output_weights",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "multi_latent_attention",
    "use_rotary_position_embeddings",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "moe_router_force_load_balancing",
    "bf16",
    "fp16",
    "grad_reduce_in_bf16",
    "fp8_param_gather",
    "accumulate_allreduce_grads_in_fp32",
    "recompute_activations",
    "moe_enable_deepep",
    "use_custom_fsdp",
)
_UNDERSCORED: Final = ("nnodes", "nproc_per_node", "num_layers_per_virtual_pipeline_stage")
"""Arguments that may be spelled with underscores, too: those of torchrun, and one of Megatron-LM."""
_OLDER_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "recompute_modules": (),
    "cp_comm_type": (),
    "cuda_graph_scope": ("--cuda-graph-scope",),
}
"""The knobs whose flag takes several values, each with its older spellings of the flag."""


class _RaisingParser(ArgumentParser):
    """An ArgumentParser that raises ArgumentError instead of ending the process."""

    def error(self, message: str) -> Any:
        raise ArgumentError(None, message)


@cache
def argument_parser() -> ArgumentParser:
    """Return a parser of Megatron-LM's arguments, which raises ArgumentError for a value of the wrong type.

    The parsed namespace has a knob under the knob's name, and any other argument under Megatron-LM's name.
    """
    parser = _RaisingParser(add_help=False, allow_abbrev=False)
    for name in _WHOLE_NUMBERS:
        parser.add_argument(_flag(name), type=int)
    for name in _TEXTS:
        parser.add_argument(_flag(name))
    for name in _SWITCHES:
        parser.add_argument(_flag(name), action="store_true")
    for name in _UNDERSCORED:
        parser.add_argument(_flag(name), f"--{name}")
    for knob in fields(Layout):
        flag = knob.metadata["flag"]
        if not flag:
            continue
        if isinstance(knob.default, bool):
            parser.add_argument(flag, dest=knob.name, action="store_true")
        elif knob.name in _OLDER_FLAGS:
            parser.add_argument(flag, *_OLDER_FLAGS[knob.name], dest=knob.name, nargs="*")
        else:
            parser.add_argument(flag, dest=knob.name, type=type(knob.default))
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
