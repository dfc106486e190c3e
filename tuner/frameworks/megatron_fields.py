"""A layout in Megatron's own words: the fields of its configs, and their values. Pure."""

from dataclasses import fields
from typing import Any

from tuner.core.layout import ENVIRONMENT_KNOBS, MOE_KNOBS, Layout, module_names

_NONE_AT_ZERO = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "recompute_num_layers",
}
"""Knobs whose value 0 stands for Megatron's None."""
_FULL_ITERATION = "full_iteration"
"""The scope, or implementation, of one graph for the whole step."""


def megatron_value(knob: str, value: Any) -> Any:
    """Return a knob's value as Megatron has it: None for a 0 or `none` that stands for None, and for a vpp of 1."""
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
    """Return Megatron's values by `section.field` of every knob, except those of the environment.

    Args:
        layout: The layout.
        base: If given, only the knobs that differ from this layout are returned.
    """
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
    """Return whether one CUDA graph holds the whole step.

    Megatron-Core 0.16 states this as a scope of graphs; from 0.19 on it is an implementation of graphs.
    """
    return layout.cuda_graph_impl != "none" and _FULL_ITERATION in module_names(layout.cuda_graph_scope)


def expert_metadata(key: str) -> set[str]:
    """Return the fields (key `megatron`) or arguments (key `flag`) of the knobs that only a mixture of experts has."""
    return {knob.metadata[key] for knob in fields(Layout) if knob.name in MOE_KNOBS}
