"""Computes the fields of Megatron Bridge's config that select a layout, or only those to change in a given recipe."""

from collections.abc import Iterable
from typing import Any, Final

from tuner.core.layout import Layout
from tuner.frameworks.megatron_fields import is_full_iteration, megatron_fields

COMM_OVERLAP: Final = "comm_overlap"
"""The path of the CommOverlapConfig in Bridge's config."""

_PLACEMENT: Final = "model.pipeline_model_parallel_layout"
_CHECKPOINT_FORMAT: Final = "checkpoint.ckpt_format"
_DATA_PARALLEL_OVERLAPS: Final = frozenset(
    {"ddp.overlap_grad_reduce", "ddp.overlap_param_gather", "optimizer.overlap_param_gather"}
)

_OLDER_GRAPH_FIELDS: Final[dict[str, Any]] = {
    "cuda_graph_scope": None,
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
}
"""Bridge's older fields for CUDA graphs, each with the value that means not set.

They are reset to this value: with any other, Bridge would refuse the newer fields, or ignore them.
"""

_DEPENDENT_FIELDS: Final[tuple[frozenset[str], ...]] = (
    frozenset({"model.context_parallel_size", "model.cp_comm_type"}),
    frozenset(
        {
            "model.recompute_granularity",
            "model.recompute_method",
            "model.recompute_num_layers",
            "model.recompute_modules",
        }
    ),
    frozenset({"model.moe_token_dispatcher_type", "model.moe_flex_dispatcher_backend"}),
    frozenset(
        {
            "model.cuda_graph_impl",
            "model.cuda_graph_modules",
            *(f"model.{name}" for name in _OLDER_GRAPH_FIELDS),
        }
    ),
    frozenset({"model.cpu_offloading", "model.cpu_offloading_num_layers"}),
    frozenset(
        {
            "ddp.use_megatron_fsdp",
            "dist.use_megatron_fsdp",
            "ddp.data_parallel_sharding_strategy",
            "model.init_model_with_meta_device",
            "ddp.fsdp_manual_registration",
            "ddp.nccl_ub",
        }
    ),
)
"""Sets of fields; in each set, some fields have an effect only with a certain value of another.

A recipe may state any value for a field without effect, and the recipe's layout does not show this value. So if one
field of a set changes, all fields of the set are written.
"""

_KNOBS_OF_OVERLAPS: Final = ("tp", "pp", "vpp", "cp", "use_distributed_optimizer", "use_megatron_fsdp")
"""The knobs from which Bridge derives the overlaps of communication that a recipe does not state."""


def bridge_settings(layout: Layout) -> dict[str, Any]:
    """Return all fields of Bridge's ConfigContainer that select a layout, as values by path.

    They select the layout in any recipe, whatever the recipe sets. Source: Megatron Bridge, training/comm_overlap.py
    (`CommOverlapConfig`) and training/config.py.
    """
    settings = megatron_fields(layout)
    overlaps = {path: value for path, value in settings.items() if path.startswith(f"{COMM_OVERLAP}.")}
    settings = {path: value for path, value in settings.items() if path not in overlaps}
    # Bridge shards the optimizer if `ddp` or `optimizer` asks for it; its own recipes state the overlapped gather in
    # both.
    settings["optimizer.use_distributed_optimizer"] = layout.use_distributed_optimizer
    settings["optimizer.overlap_param_gather"] = layout.overlap_param_gather
    settings |= _companions(layout)
    if not any(overlaps.values()):
        # The defaults of a CommOverlapConfig would replace the fields of `ddp`, so there must be none.
        return {**settings, COMM_OVERLAP: None}
    return {
        **settings,
        **overlaps,
        f"{COMM_OVERLAP}.batch_p2p_comm": not layout.overlap_p2p_comm,
        f"{COMM_OVERLAP}.overlap_grad_reduce": layout.overlap_grad_reduce,
        f"{COMM_OVERLAP}.overlap_param_gather": layout.overlap_param_gather,
        # A recipe's preset of user buffers fits only the recipe's own tp and micro-batch size.
        f"{COMM_OVERLAP}.tp_comm_overlap_cfg": None,
    }


def bridge_changes(layout: Layout, recipe_layout: Layout | None) -> dict[str, Any]:
    """Return the fields to set, as values by path, so that a recipe gets a layout.

    Args:
        layout: The layout to select.
        recipe_layout: The layout that the recipe has now; None returns all `bridge_settings` of `layout`.
    """
    wanted = bridge_settings(layout)
    if recipe_layout is None:
        return wanted
    if layout == recipe_layout:
        return {}
    present = bridge_settings(recipe_layout)
    changed = {path for path, value in wanted.items() if path not in present or present[path] != value}
    if layout.pp > 1 or recipe_layout.pp > 1:
        # The placement is always stated, since Bridge may otherwise choose one from its own table for the new pp.
        changed.add(_PLACEMENT)
    if recipe_layout.use_megatron_fsdp and not layout.use_megatron_fsdp:
        wanted[_CHECKPOINT_FORMAT] = "torch_dist"
        changed.add(_CHECKPOINT_FORMAT)
    for dependent_fields in _DEPENDENT_FIELDS:
        if changed & dependent_fields:
            changed |= dependent_fields
    # If Bridge would derive the overlaps again, all of them are stated, also those of `ddp`: the recipe may set values
    # there that Bridge has overwritten so far.
    if any(map(_is_overlap, changed)) or _differ(layout, recipe_layout, _KNOBS_OF_OVERLAPS):
        changed |= set(filter(_is_overlap, wanted))
    return {path: value for path, value in wanted.items() if path in changed}


def _companions(layout: Layout) -> dict[str, Any]:
    """Return the further fields, as values by path, that Bridge needs in addition to the knobs of a layout.

    Source: Megatron Bridge, training/config.py, models/gpt_provider.py, utils/cuda_graph.py.
    """
    fsdp = layout.use_megatron_fsdp
    shards_weights = fsdp and layout.data_parallel_sharding_strategy == "optim_grads_params"
    companions: dict[str, Any] = {
        **{f"model.{name}": value for name, value in _OLDER_GRAPH_FIELDS.items()},
        "model.cpu_offloading": layout.cpu_offloading_num_layers > 0,
        "dist.use_megatron_fsdp": fsdp,
        "ddp.fsdp_manual_registration": fsdp and layout.nccl_ub,
        # Sharded weights may be too large for one GPU as a whole, so the model is built on the meta device.
        "model.init_model_with_meta_device": shards_weights,
    }
    if fsdp:
        companions[_CHECKPOINT_FORMAT] = "fsdp_dtensor"
    if layout.cuda_graph_impl != "none":
        companions |= {"model.use_te_rng_tracker": True, "rng.te_rng_tracker": True}
    if is_full_iteration(layout):
        companions["rerun_state_machine.check_for_nan_in_loss"] = False
    return companions


def _differ(layout: Layout, other: Layout, knobs: Iterable[str]) -> bool:
    return any(getattr(layout, knob) != getattr(other, knob) for knob in knobs)


def _is_overlap(path: str) -> bool:
    return path.split(".")[0] == COMM_OVERLAP or path in _DATA_PARALLEL_OVERLAPS
