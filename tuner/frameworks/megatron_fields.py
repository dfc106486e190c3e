"""Writes a layout as the fields of Megatron's configs and their values."""

from dataclasses import fields
from typing import Any

from tuner.core.layout import ENVIRONMENT_KNOBS, MOE_KNOBS, Layout, module_names

_NONE_AT_ZERO = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "recompute_num_layers",
}
"""Knobs for which a layout states 0 and Megatron states None."""
_FULL_ITERATION = "full_iteration"
"""Megatron's name of the CUDA graph scope, or implementation, that captures a whole step in one graph."""


def megatron_value(knob: str, value: Any) -> Any:
    """Return the value that Megatron's config has for a knob's value in a layout.

    It is None for the text `none` (except of `cuda_graph_impl`), for a vpp of 1, and for the 0 of some knobs. Texts of
    joined names become lists.
    """
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
    """Return the values of Megatron's config fields that select a layout, by `section.field`.

    Knobs that are environment variables are left out.

    Args:
        layout: The layout to select.
        base: If given, only the fields of knobs that differ between `layout` and `base` are returned.
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
    """Return whether a layout captures the whole step in one CUDA graph.

    Megatron-Core 0.16 states this as a scope of CUDA graphs, and from 0.19 on as an implementation of CUDA graphs.
    """
    return layout.cuda_graph_impl != "none" and _FULL_ITERATION in module_names(layout.cuda_graph_scope)


def expert_metadata(key: str) -> set[str]:
    """Return the names in Megatron of the knobs that only a mixture of experts has.

    Args:
        key: `megatron` for the config fields, `flag` for the command-line flags.
    """
    return {knob.metadata[key] for knob in fields(Layout) if knob.name in MOE_KNOBS}
