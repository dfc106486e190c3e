"""A layout in Megatron's own words: the fields of its configs, and the arguments of Megatron-LM. Pure."""

from dataclasses import fields
from typing import Any

from tuner.core.layout import ENVIRONMENT_KNOBS, MOE_KNOBS, Layout, module_names
from tuner.core.workload import Model

_NONE_AT_ZERO = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "recompute_num_layers",
}
_FULL_ITERATION = "full_iteration"


def megatron_value(knob: str, value: Any) -> Any:
    """A knob's value as Megatron has it: our 0 and `none` are its None, and so is a vpp of 1."""
    if knob == "cuda_graph_scope":
        return [name for name in module_names(value) if name != _FULL_ITERATION]
    if knob == "recompute_modules":
        return list(module_names(value)) or None
    if knob == "cuda_graph_impl":
        return value
    if value == "none" or (knob in _NONE_AT_ZERO and value == 0) or (knob == "vpp" and value == 1):
        return None
    return value


def megatron_fields(layout: Layout, base: Layout | None = None) -> dict[str, Any]:
    """Megatron's values by `group.field`: of the knobs that differ from `base`, of every knob without one."""
    values = {
        knob.metadata["megatron"]: megatron_value(knob.name, getattr(layout, knob.name))
        for knob in fields(Layout)
        if knob.name not in ENVIRONMENT_KNOBS
        and (base is None or getattr(layout, knob.name) != getattr(base, knob.name))
    }
    if is_full_iteration(layout) and "model.cuda_graph_modules" in values:
        values["model.cuda_graph_impl"] = _FULL_ITERATION
    return values


def is_full_iteration(layout: Layout) -> bool:
    """Whether one graph holds the whole step: a scope in Megatron-Core 0.16, an implementation from 0.19 on."""
    return layout.cuda_graph_impl != "none" and _FULL_ITERATION in module_names(layout.cuda_graph_scope)


def megatron_lm_arguments(layout: Layout) -> dict[str, list[str]]:
    """Megatron-LM's arguments for a layout: flag to values; none for a flag that stands alone.

    Source: Megatron-LM, megatron/training/arguments.py; interleaving turns p2p overlap on by itself there.
    """
    values = megatron_fields(layout)
    arguments: dict[str, list[str]] = {}
    for knob in fields(Layout):
        if knob.name in ENVIRONMENT_KNOBS or _is_idle(knob.name, layout):
            continue
        value = values[knob.metadata["megatron"]]
        if knob.name == "overlap_p2p_comm":
            value = layout.vpp > 1 and not layout.overlap_p2p_comm
        if value is True:
            arguments[knob.metadata["flag"]] = []
        elif isinstance(value, list):
            arguments |= {knob.metadata["flag"]: value} if value else {}
        elif value is not None and value is not False:
            arguments[knob.metadata["flag"]] = [str(value)]
    return arguments | _megatron_lm_companions(layout)


def megatron_lm_words(layout: Layout, model: Model) -> list[str]:
    """The arguments as words of a command line; without those of experts where there are none."""
    useless = set() if model.is_moe else expert_metadata("flag")
    arguments = megatron_lm_arguments(layout)
    return [word for flag, values in arguments.items() if flag not in useless for word in (flag, *values)]


def _is_idle(knob: str, layout: Layout) -> bool:
    """Whether a knob's argument would say nothing new, so that older releases need not know it."""
    match knob:
        case "vpp":  # a placement tells it, and is refused beside it
            return layout.pipeline_model_parallel_layout != "none"
        case "cp_comm_type":
            return layout.cp == 1
        case "moe_flex_dispatcher_backend":
            return layout.moe_token_dispatcher_type != "flex"  # noqa: S105
        case "cuda_graph_impl" | "cuda_graph_scope":
            return layout.cuda_graph_impl == "none"
        case "data_parallel_sharding_strategy":
            return not layout.use_megatron_fsdp
        case "cpu_offloading_num_layers":
            return layout.cpu_offloading_num_layers == 0
        case _:
            return False


def _megatron_lm_companions(layout: Layout) -> dict[str, list[str]]:
    """What Megatron-LM's `validate_args` wants beside the knobs."""
    companions: dict[str, list[str]] = {}
    if layout.use_megatron_fsdp:
        companions["--ckpt-format"] = ["fsdp_dtensor"]
        if layout.data_parallel_sharding_strategy == "optim_grads_params":
            companions["--init-model-with-meta-device"] = []
    if layout.cuda_graph_impl != "none":
        companions["--te-rng-tracker"] = []
    if is_full_iteration(layout):
        companions["--no-check-for-nan-in-loss-and-grad"] = []
    return companions


def expert_metadata(key: str) -> set[str]:
    """The fields (`megatron`) or arguments (`flag`) that a dense model has no use for."""
    return {knob.metadata[key] for knob in fields(Layout) if knob.name in MOE_KNOBS}
