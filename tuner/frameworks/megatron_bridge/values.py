"""Reads plain values by path, such as `model.num_layers`, from a ConfigContainer of Megatron Bridge.

The names come from Megatron-Core's TransformerConfig and from Megatron Bridge's training/config.py.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from tuner.core.layout import ENVIRONMENT_KNOBS, Layout
from tuner.core.workload import Model

Values = Mapping[str, Any]
"""Plain values of a ConfigContainer by path (`model.num_layers`); a path that the config lacks is absent."""

_FURTHER_PATHS: Final = (
    "model.bf16",
    "model.fp16",
    "model.interleaved_attn_pattern",
    "model.seq_length",
    "model.cuda_graph_scope",
    "model.cuda_graph_modules",
    "model.cpu_offloading",
    "model.fine_grained_activation_offloading",
    "model.offload_modules",
    "model.moe_router_force_load_balancing",
    "model.moe_expert_capacity_factor",
    "model.moe_pad_expert_input_to_capacity",
    "model.hierarchical_context_parallel_sizes",
    "model.experimental_attention_variant",
    "model.hybrid_layer_pattern",
    "model.hybrid_override_pattern",
    "model.is_hybrid_model",
    "model.heterogeneous_block_specs",
    "model.moe_latent_size",
    "model.attention_output_gate",
    "model.linear_attention_freq",
    "model.csa_compress_ratios",
    "model.freeze_language_model",
    "model.freeze_vision_model",
    "model.freeze_vision_projection",
    "train.global_batch_size",
    "dataset.seq_length",
    "tokenizer.vocab_size",
    "ddp.grad_reduce_in_fp32",
    "ddp.num_distributed_optimizer_instances",
    "ddp.megatron_fsdp_version",
    "optimizer.optimizer",
    "optimizer.use_precision_aware_optimizer",
    "optimizer.optimizer_cpu_offload",
    "optimizer.use_distributed_optimizer",
    "dist.use_megatron_fsdp",
    "dist.use_torch_fsdp2",
    "mixed_precision.fp8",
    "mixed_precision.fp8_recipe",
    "mixed_precision.fp8_param_gather",
    "mixed_precision.fp4",
    "mixed_precision.grad_reduce_in_fp32",
    "env_vars",
)
"""Paths that belong to no field of Model and no knob of Layout."""


def _knob_paths() -> list[str]:
    """Return the paths of the knobs in Bridge's config, except of knobs that are environment variables.

    The knobs under `comm_overlap` have two paths, since Bridge moves them into `model` when it resolves a recipe.
    """
    paths = [knob.metadata["megatron"] for knob in fields(Layout) if knob.name not in ENVIRONMENT_KNOBS]
    moved = [path.replace("comm_overlap.", "model.") for path in paths if path.startswith("comm_overlap.")]
    return [*paths, *moved]


PATHS: Final = tuple(
    dict.fromkeys(
        (
            *(f"model.{field.name}" for field in fields(Model) if field.name != "name"),
            *_knob_paths(),
            *_FURTHER_PATHS,
        )
    )
)
"""All paths of a config from which values are read."""

_ABSENT: Final = object()


def values_of(config: Any) -> dict[str, Any]:
    """Return the plain values of a ConfigContainer by path; a path that the config lacks is left out.

    Args:
        config: A ConfigContainer of Bridge, or any object with the attributes of one.
    """
    values = {}
    for path in PATHS:
        value = config
        for part in path.split("."):
            value = getattr(value, part, _ABSENT)
        if value is not _ABSENT:
            values[path] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    """Return a value as plain data: an enum or a function as its name, a placement of layers as its text or lists."""
    value = getattr(value, "input_data", value)  # the text of Megatron's PipelineParallelLayerLayout
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__
