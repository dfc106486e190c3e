"""A Megatron-LM command line, read: its model, its workload, its layout and its world.

Reads the words of `pretrain_gpt.py ...` or of the shell script that holds them; nothing is run. Names and defaults are
those of Megatron-LM, megatron/training/arguments.py; what `validate_args` there derives is derived here.
"""

import ast
import re
import shlex
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from tuner.core.layout import Layout, data_parallel_size
from tuner.core.pipeline_layout import parse as placed
from tuner.core.workload import Precision, Workload
from tuner.errors import InputError
from tuner.files import parse

_MODEL_NUMBERS: Final = (
    *(
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "num_query_groups",
    ),
    *("vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings", "window_attn_skip_freq"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size"),
    *("moe_router_num_groups", "moe_router_group_topk", "mtp_num_layers"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
)
_MODEL_WORDS: Final = (
    *(
        "normalization",
        "position_embedding_type",
        "rotary_base",
        "window_size",
        "softmax_type",
        "moe_layer_freq",
    ),
    *("moe_router_load_balancing_type", "moe_router_score_function", "moe_router_topk_scaling_factor"),
)
_SWITCHES: Final = (
    *(
        "group_query_attention",
        "swiglu",
        "squared_relu",
        "quick_geglu",
        "untie_embeddings_and_output_weights",
    ),
    *("disable_bias_linear", "add_qkv_bias", "qk_layernorm", "multi_latent_attention"),
    *("use_rotary_position_embeddings", "moe_router_pre_softmax", "moe_router_enable_expert_bias"),
    *("moe_router_force_load_balancing", "bf16", "fp16", "grad_reduce_in_bf16", "fp8_param_gather"),
    *("accumulate_allreduce_grads_in_fp32", "recompute_activations", "moe_enable_deepep", "use_custom_fsdp"),
)
_VOCABULARIES: Final[Mapping[str, int]] = {"GPT2BPETokenizer": 50257, "Llama3Tokenizer": 128256}
"""Of tokenizers whose vocabulary their name tells."""

_UNJUDGED: Final = frozenset(
    {
        *("use_torch_fsdp2", "optimizer_cpu_offload"),
        *("fine_grained_activation_offloading", "rampup_batch_size"),
        *("hierarchical_context_parallel_sizes", "num_distributed_optimizer_instances"),
        *("use_precision_aware_optimizer", "spec", "yaml_cfg", "hybrid_override_pattern"),
        *("heterogeneous_layers_config_path", "experimental_attention_variant"),
        *("enable_cuda_graph", "external_cuda_graph"),
    }
)
"""Arguments that change memory, speed or validity in ways that no rule here knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """What a Megatron-LM command would train, and how."""

    workload: Workload
    layout: Layout
    world_size: int
    """GPUs."""
    unjudged: tuple[str, ...]
    """Flags that matter and are not judged."""


class _Parser(ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> Any:
        raise ArgumentError(None, message)


def read_command(
    text: str, source: str, world_size: int | None = None, vocab_size: int | None = None
) -> CommandLine:
    """Read a command line, or a shell script whose arguments stand in it as words.

    Args:
        text: The command or script; variables that it assigns plainly are filled in.
        source: What to call it in errors; names the model.
        world_size: GPUs; None takes them from torchrun's arguments.
        vocab_size: Rows of the embedding, for a tokenizer that only the run itself could ask.

    Raises:
        InputError: if an argument that is needed is missing, or is not what Megatron-LM takes.
    """
    try:
        words, variables = _words(text)
        found, rest = _parser().parse_known_args(words)
        if found.num_layers is None or found.hidden_size is None or found.num_attention_heads is None:
            raise InputError(
                f"{source}: no --num-layers, --hidden-size and --num-attention-heads: is it a Megatron-LM command?"
            )
        world = world_size or _world_size(found)
        layout = _layout(found, variables, source)
        workload = _workload(found, source, layout, world, vocab_size)
    except (ArgumentError, ValueError, SyntaxError) as error:
        raise InputError(f"{source}: {error}") from None
    flags = {
        word.split("=")[0].removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")
    }
    unjudged = tuple(f"--{name.replace('_', '-')}" for name in sorted(flags & _UNJUDGED))
    return CommandLine(workload=workload, layout=layout, world_size=world, unjudged=unjudged)


def _words(text: str) -> tuple[list[str], dict[str, str]]:
    """The words of a script, its own variables filled in, and those; an array's parentheses stand apart."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="();&|<>")
    lexer.whitespace_split = True
    known: dict[str, str] = {}
    words = []
    for word in lexer:
        filled = _VARIABLE.sub(lambda match: known.get(match[1], match[2] or match[0]), word)
        if assigned := _ASSIGNMENT.fullmatch(filled):
            known[assigned[1]] = assigned[2]
        words.append(filled)
    return words, known


_VARIABLE: Final = re.compile(r"\$\{?([A-Za-z_]\w*)(?::-([^}]*))?\}?")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)=(.+)", re.S)


_LISTS: Final[Mapping[str, tuple[str, ...]]] = {
    "recompute_modules": (),
    "cp_comm_type": (),
    "cuda_graph_scope": ("--cuda-graph-scope",),
}
"""Knobs whose argument takes several words, with its older names."""


def _parser() -> ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in (*_MODEL_NUMBERS, "seq_length", "encoder_seq_length", "global_batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in (*_MODEL_WORDS, "fp8_format", "fp8_recipe", "fp4_format", "tokenizer_type"):
        parser.add_argument(f"--{name.replace('_', '-')}")
    for name in _SWITCHES:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    for name in ("nnodes", "nproc_per_node", "num_layers_per_virtual_pipeline_stage"):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}")
    for knob in fields(Layout):
        flag = knob.metadata["flag"]
        if not flag:
            continue
        if isinstance(knob.default, bool):
            parser.add_argument(flag, dest=knob.name, action="store_true")
        elif knob.name in _LISTS:
            parser.add_argument(flag, *_LISTS[knob.name], dest=knob.name, nargs="*")
        else:
            parser.add_argument(flag, dest=knob.name, type=type(knob.default))
    return parser


def _world_size(found: Namespace) -> int:
    try:
        nodes = int((found.nnodes or "1").split(":")[-1])
        return nodes * int(found.nproc_per_node)
    except (TypeError, ValueError):
        raise ValueError(
            "the number of GPUs is not told: no plain --nproc-per-node and --nnodes; give --gpus"
        ) from None


def _layout(found: Namespace, variables: Mapping[str, str], source: str) -> Layout:
    given = {knob.name: getattr(found, knob.name, None) for knob in fields(Layout)}
    data = {name: value for name, value in given.items() if value is not None}
    data.setdefault("etp", data.get("tp", 1))
    data["sp"] = data["sp"] and data.get("tp", 1) > 1  # Megatron-LM clears it, with a warning
    data.setdefault("moe_token_dispatcher_type", "allgather")
    if found.moe_enable_deepep:
        data |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    if found.num_experts is None:
        data |= {"etp": 1, "moe_token_dispatcher_type": "alltoall"}
    if found.recompute_activations:
        data["recompute_granularity"] = "selective"
    data["recompute_modules"] = "+".join(found.recompute_modules or ()) or "none"
    if found.num_layers_per_virtual_pipeline_stage is not None:
        data["vpp"] = _chunks(found, data)
    if found.pipeline_model_parallel_layout:
        data["vpp"] = max(1, len(placed(found.pipeline_model_parallel_layout)) // data.get("pp", 1))
    # Interleaving overlaps its messages unless told not to.
    data["overlap_p2p_comm"] = data.get("vpp", 1) > 1 and not found.overlap_p2p_comm
    data |= _context_and_graphs(found, data) | _sharding(found)
    return parse(Layout, data | _environment(variables, data), source)


def _context_and_graphs(found: Namespace, data: Mapping[str, Any]) -> dict[str, Any]:
    """What is of no meaning without its other half has its default, as in every layout."""
    kinds = set(found.cp_comm_type or ())
    if len(kinds) > 1:
        raise ValueError(
            f"--cp-comm-type {' '.join(found.cp_comm_type)}: one kind for all layers is all that is known"
        )
    values: dict[str, Any] = {"cp_comm_type": kinds.pop() if kinds and data.get("cp", 1) > 1 else "p2p"}
    if data["moe_token_dispatcher_type"] != "flex":  # noqa: S105
        values["moe_flex_dispatcher_backend"] = "deepep"
    scope = "+".join(found.cuda_graph_scope or ())
    values["cuda_graph_scope"] = scope if scope not in {"", "full"} and found.cuda_graph_impl else "none"
    if found.cuda_graph_impl == "full_iteration":  # a scope of `local` before Megatron-Core 0.19
        values |= {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
    return values


def _sharding(found: Namespace) -> dict[str, Any]:
    """Megatron-FSDP implies the distributed optimizer, and shards everything unless told otherwise."""
    if not (found.use_megatron_fsdp or found.use_custom_fsdp):
        return {"data_parallel_sharding_strategy": "no_shard"}
    return {
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": True,
        "data_parallel_sharding_strategy": found.data_parallel_sharding_strategy or "optim_grads_params",
    }


def _environment(variables: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that a script sets as variables. Megatron-LM asks for the single queue wherever tp or cp is above 1."""
    queues = variables.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    expected = (
        queues == "1" and max(data.get("tp", 1), data.get("cp", 1)) > 1 and not data["use_megatron_fsdp"]
    )
    return {
        "cuda_device_max_connections": int(queues) if queues.isdigit() and not expected else 0,
        "expandable_segments": "expandable_segments:True" in variables.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "nccl_nvls_enable": variables.get("NCCL_NVLS_ENABLE", "") != "0",
    }


def _chunks(found: Namespace, data: Mapping[str, Any]) -> int:
    layers = found.num_layers + found.account_for_embedding_in_pipeline_split
    layers += found.account_for_loss_in_pipeline_split
    each, pp = int(found.num_layers_per_virtual_pipeline_stage), data.get("pp", 1)
    if layers % (pp * each):
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage {each}: {layers} layers % (pp {pp} * {each}) = "
            f"{layers % (pp * each)}, but must be 0"
        )
    return int(layers // (pp * each))


def _workload(
    found: Namespace, source: str, layout: Layout, world_size: int, vocab_size: int | None
) -> Workload:
    seq_length = found.seq_length or found.encoder_seq_length
    if seq_length is None:
        raise ValueError("no --seq-length")
    dp = data_parallel_size(world_size, layout.tp, layout.pp, layout.cp)
    precision = _precision(found)
    data = {
        "model": _model(found, source, vocab_size),
        "seq_length": seq_length,
        "global_batch_size": found.global_batch_size or max(1, layout.micro_batch_size * dp),
        "precision": precision,
        "grad_reduce_in_fp32": found.accumulate_allreduce_grads_in_fp32
        or (precision != "fp16" and not found.grad_reduce_in_bf16),
        "fp8_param": found.fp8_param_gather and precision in {"fp8", "mxfp8"},
        "moe_router_force_load_balancing": found.moe_router_force_load_balancing,
    }
    return parse(Workload, data, source)


def _precision(found: Namespace) -> Precision:
    if found.fp4_format:
        return "nvfp4"
    if found.fp8_format:
        return "mxfp8" if found.fp8_recipe == "mxfp8" else "fp8"
    return "bf16" if found.bf16 else "fp16" if found.fp16 else "fp32"


def _model(found: Namespace, source: str, vocab_size: int | None) -> dict[str, Any]:
    """The fields of Model, where Megatron-LM's defaults are not its own."""
    hidden, heads = found.hidden_size, found.num_attention_heads
    vocabulary = vocab_size or found.vocab_size or _VOCABULARIES.get(found.tokenizer_type or "")
    if vocabulary is None:
        raise ValueError(
            "the vocabulary is not told: no --vocab-size, and only a run could ask the tokenizer; give --vocab-size"
        )
    rotary = found.use_rotary_position_embeddings or found.position_embedding_type == "rope"
    position = "rope" if rotary else found.position_embedding_type or "learned_absolute"
    plain_width = int(4 * hidden * 2 / 3 / 64) * 64 if found.swiglu else 4 * hidden
    model = {
        "name": re.sub(r"\W+", "-", source.rpartition("/")[2]).strip("-").lower() or "command",
        "num_layers": found.num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": found.ffn_hidden_size or plain_width,
        "num_attention_heads": heads,
        "num_query_groups": found.num_query_groups or 1 if found.group_query_attention else heads,
        "kv_channels": found.kv_channels or hidden // heads,
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": found.make_vocab_size_divisible_by or 128,
        "gated_linear_unit": found.swiglu or found.quick_geglu,
        "activation_func": _activation(found),
        "normalization": found.normalization or "LayerNorm",
        "position_embedding_type": position,
        "max_position_embeddings": found.max_position_embeddings or 0
        if position == "learned_absolute"
        else 0,
        "rotary_base": int(float(found.rotary_base or 10000)),
        "share_embeddings_and_output_weights": not found.untie_embeddings_and_output_weights,
        "add_bias_linear": not found.disable_bias_linear,
        "add_qkv_bias": found.add_qkv_bias or not found.disable_bias_linear,
        "qk_layernorm": found.qk_layernorm,
        "window_size": _window(found.window_size),
        "window_attn_skip_freq": found.window_attn_skip_freq,
        "softmax_type": found.softmax_type or "vanilla",
        "mtp_num_layers": found.mtp_num_layers,
    }
    if found.multi_latent_attention:
        model |= _latent_attention(found)
    return model | _experts(found, model["ffn_hidden_size"]) if found.num_experts else model


def _activation(found: Namespace) -> str:
    if found.swiglu:
        return "silu"
    return "squared_relu" if found.squared_relu else "quick_gelu" if found.quick_geglu else "gelu"


def _latent_attention(found: Namespace) -> dict[str, Any]:
    """Megatron-LM's own defaults: _add_mla_args."""
    return {
        "multi_latent_attention": True,
        "num_query_groups": found.num_attention_heads,
        "q_lora_rank": found.q_lora_rank,
        "kv_lora_rank": found.kv_lora_rank or 32,
        "qk_head_dim": found.qk_head_dim or 128,
        "qk_pos_emb_head_dim": found.qk_pos_emb_head_dim or 64,
        "v_head_dim": found.v_head_dim or 128,
    }


def _experts(found: Namespace, dense_width: int) -> dict[str, Any]:
    scaling = found.moe_router_topk_scaling_factor
    return {
        "num_moe_experts": found.num_experts,
        "moe_ffn_hidden_size": found.moe_ffn_hidden_size or dense_width,
        "moe_router_topk": found.moe_router_topk or 2,
        "moe_shared_expert_intermediate_size": found.moe_shared_expert_intermediate_size,
        "moe_layer_freq": _pattern(found.moe_layer_freq or "1"),
        "moe_router_load_balancing_type": found.moe_router_load_balancing_type or "aux_loss",
        "moe_router_score_function": found.moe_router_score_function or "softmax",
        "moe_router_pre_softmax": found.moe_router_pre_softmax,
        "moe_router_num_groups": found.moe_router_num_groups,
        "moe_router_group_topk": found.moe_router_group_topk,
        "moe_router_topk_scaling_factor": None if scaling is None else float(scaling),
        "moe_router_enable_expert_bias": found.moe_router_enable_expert_bias,
    }


def _window(text: str | None) -> list[int] | None:
    return None if text is None else [int(part) for part in text.strip("()").split(",")]


def _pattern(text: str) -> int | list[int]:
    """Megatron-LM takes a number, or a Python expression of lists: `([0]*3+[1]*1)*2`. Read, not evaluated."""
    return _reckon(ast.parse(text, mode="eval").body)


_LONGEST: Final = 10_000


def _reckon(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=[*items]):
            values = [_reckon(item) for item in items]
            if all(isinstance(value, int) for value in values):
                return [value for value in values if isinstance(value, int)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _reckon(left), _reckon(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, second = _reckon(left), _reckon(right)
            if isinstance(second, list):
                first, second = second, first
            if isinstance(first, list) and isinstance(second, int) and len(first) * second <= _LONGEST:
                return first * second
    raise ValueError(f"--moe-layer-freq: cannot read {ast.unparse(node)!r}: lists of 0 and 1, + and * only")
