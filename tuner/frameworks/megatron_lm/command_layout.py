"""Turns parsed arguments of Megatron-LM into a layout, with the values that Megatron-LM's `validate_args` derives.

Source: Megatron-LM, megatron/training/arguments.py.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tuner.core.layout import Layout
from tuner.core.pipeline_layout import parse as chunks_of_placement
from tuner.files import parse


def layout_of(arguments: Namespace, variables: Mapping[str, str], source: str) -> Layout:
    """Return the layout that a Megatron-LM command selects.

    Args:
        arguments: The command's arguments, as parsed by `argument_parser`; `num_layers` must be stated.
        variables: The values of environment variables that the script sets.
        source: The name of the command in error messages.

    Raises:
        InputError: if an argument has a value that no Layout can have.
        ValueError: if the number of layers is not divisible as an argument requires, or an argument asks for something
            that Layout has no knob for.
    """
    stated = {knob.name: getattr(arguments, knob.name, None) for knob in fields(Layout)}
    data = {name: value for name, value in stated.items() if value is not None}
    data.setdefault("etp", data.get("tp", 1))
    data["sp"] = data["sp"] and data.get("tp", 1) > 1  # with tp 1, Megatron-LM turns sp off and warns
    data.setdefault("moe_token_dispatcher_type", "allgather")
    if arguments.moe_enable_deepep:
        data |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    if arguments.num_experts is None:
        data |= {"etp": 1, "moe_token_dispatcher_type": "alltoall"}
    if arguments.recompute_activations:
        data["recompute_granularity"] = "selective"
    data["recompute_modules"] = "+".join(arguments.recompute_modules or ()) or "none"
    if arguments.num_layers_per_virtual_pipeline_stage is not None:
        data["vpp"] = _chunks_per_rank(arguments, data)
    if placement := arguments.pipeline_model_parallel_layout:
        data["vpp"] = max(1, len(chunks_of_placement(placement)) // data.get("pp", 1))
    # With interleaving, Megatron-LM overlaps p2p communication unless this flag, a negation, is given.
    data["overlap_p2p_comm"] = data.get("vpp", 1) > 1 and not arguments.overlap_p2p_comm
    data |= _dependent_knobs(arguments, data) | _sharding(arguments)
    return parse(Layout, data | _environment(variables, data), source)


def _dependent_knobs(arguments: Namespace, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs that have an effect only with a certain value of another knob, and otherwise their default."""
    kinds = set(arguments.cp_comm_type or ())
    if len(kinds) > 1:
        raise ValueError(
            f"--cp-comm-type {' '.join(arguments.cp_comm_type)}: a layout states one kind for all layers"
        )
    values: dict[str, Any] = {"cp_comm_type": kinds.pop() if kinds and data.get("cp", 1) > 1 else "p2p"}
    if data["moe_token_dispatcher_type"] != "flex":  # noqa: S105
        values["moe_flex_dispatcher_backend"] = "deepep"
    scope = "+".join(arguments.cuda_graph_scope or ())
    values["cuda_graph_scope"] = scope if scope not in {"", "full"} and arguments.cuda_graph_impl else "none"
    # Megatron-Core has this implementation from 0.19 on. Before, and in a Layout, it is a scope of `local`.
    if arguments.cuda_graph_impl == "full_iteration":
        values |= {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
    return values


def _sharding(arguments: Namespace) -> dict[str, Any]:
    """Return the knobs of data-parallel sharding.

    Megatron-FSDP implies the distributed optimizer, and by default shards optimizer state, gradients and weights.
    """
    if not (arguments.use_megatron_fsdp or arguments.use_custom_fsdp):
        return {"data_parallel_sharding_strategy": "no_shard"}
    return {
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": True,
        "data_parallel_sharding_strategy": arguments.data_parallel_sharding_strategy or "optim_grads_params",
    }


def _environment(variables: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs that a script sets as environment variables.

    Without Megatron-FSDP, Megatron-LM requires CUDA_DEVICE_MAX_CONNECTIONS=1 if tp or cp is above 1. In this case, a
    stated 1 becomes the knob's default 0, which means that the value is derived from the layout.
    """
    queues = variables.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    needs_one_queue = max(data.get("tp", 1), data.get("cp", 1)) > 1 and not data["use_megatron_fsdp"]
    is_default = queues == "1" and needs_one_queue
    return {
        "cuda_device_max_connections": int(queues) if queues.isdigit() and not is_default else 0,
        "expandable_segments": "expandable_segments:True" in variables.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "nccl_nvls_enable": variables.get("NCCL_NVLS_ENABLE", "") != "0",
    }


def _chunks_per_rank(arguments: Namespace, data: Mapping[str, Any]) -> int:
    """Return vpp, computed from the layers per chunk that --num-layers-per-virtual-pipeline-stage states.

    Raises:
        ValueError: if the number of layers is not divisible by pp times the layers per chunk.
    """
    layers = arguments.num_layers + arguments.account_for_embedding_in_pipeline_split
    layers += arguments.account_for_loss_in_pipeline_split
    per_chunk, pp = int(arguments.num_layers_per_virtual_pipeline_stage), data.get("pp", 1)
    if layers % (pp * per_chunk):
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk}: {layers} layers % (pp {pp} * {per_chunk}) = "
            f"{layers % (pp * per_chunk)}, but must be 0"
        )
    return int(layers // (pp * per_chunk))
