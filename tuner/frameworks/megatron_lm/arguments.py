"""Writes a layout as command-line arguments of Megatron-LM."""

from dataclasses import fields

from tuner.core.layout import ENVIRONMENT_KNOBS, Layout
from tuner.core.workload import Model
from tuner.frameworks.megatron_fields import expert_metadata, is_full_iteration, megatron_fields


def megatron_lm_arguments(layout: Layout) -> dict[str, list[str]]:
    """Return the command-line arguments that select a layout in Megatron-LM, as values by flag.

    A flag without a value has an empty list. With interleaving, Megatron-LM overlaps p2p communication by default, so
    the flag of the knob `overlap_p2p_comm` is written if the overlap is off. Source: Megatron-LM,
    megatron/training/arguments.py.
    """
    values = megatron_fields(layout)
    arguments: dict[str, list[str]] = {}
    for knob in fields(Layout):
        if knob.name in ENVIRONMENT_KNOBS or _has_no_effect(knob.name, layout):
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
    return arguments | _companions(layout)


def megatron_lm_words(layout: Layout, model: Model) -> list[str]:
    """Return `megatron_lm_arguments` as a flat list for a command line; for a dense model without expert arguments."""
    omitted_flags = set() if model.is_moe else expert_metadata("flag")
    arguments = megatron_lm_arguments(layout)
    return [
        word for flag, values in arguments.items() if flag not in omitted_flags for word in (flag, *values)
    ]


def _has_no_effect(knob: str, layout: Layout) -> bool:
    """Return whether a knob has no effect in a layout; its argument is then left out, as older releases may lack it."""
    match knob:
        case "vpp":  # a placement of the layers determines vpp, and Megatron-LM refuses both together
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


def _companions(layout: Layout) -> dict[str, list[str]]:
    """Return the further arguments, as values by flag, that Megatron-LM's `validate_args` requires for some knobs."""
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
