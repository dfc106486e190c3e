"""What selects a layout in Megatron Bridge: the fields of its configuration, written in each of its formats."""

import re
from collections.abc import Mapping
from typing import Any

from tuner.core.layout import Layout
from tuner.frameworks.megatron_fields import (
    expert_metadata,
    is_full_iteration,
    megatron_fields,
)
from tuner.trial.contract import TrialSpec

_PLACEMENT = "model.pipeline_model_parallel_layout"


_COMM_OVERLAP = "comm_overlap"


_DATA_OVERLAPS = ("ddp.overlap_grad_reduce", "ddp.overlap_param_gather", "optimizer.overlap_param_gather")


_COMM_OVERLAP_CLASS = "megatron.bridge.training.comm_overlap.CommOverlapConfig"


_OLDER_GRAPHS = {"cuda_graph_scope": None, "enable_cuda_graph": False, "external_cuda_graph": False}
"""Older names of the knobs, which are refused beside theirs or win over them; and what says nothing."""


_TOGETHER = (
    ("model.context_parallel_size", "model.cp_comm_type"),
    tuple(f"model.recompute_{what}" for what in ("granularity", "method", "num_layers", "modules")),
    ("model.moe_token_dispatcher_type", "model.moe_flex_dispatcher_backend"),
    tuple(f"model.{name}" for name in ("cuda_graph_impl", "cuda_graph_modules", *_OLDER_GRAPHS)),
    ("model.cpu_offloading", "model.cpu_offloading_num_layers"),
    (
        *("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp", "ddp.data_parallel_sharding_strategy"),
        *("model.init_model_with_meta_device", "ddp.fsdp_manual_registration", "ddp.nccl_ub"),
    ),
)
"""Fields that mean something only together: where a recipe leaves one of them idle, any value may stand in it."""


def bridge_settings(layout: Layout) -> dict[str, Any]:
    """Every field of Megatron Bridge's ConfigContainer that selects `layout`, whatever the recipe had.

    Source: Megatron Bridge, training/comm_overlap.py (`CommOverlapConfig`) and training/config.py.
    """
    settings = megatron_fields(layout)
    overlaps = {path: value for path, value in settings.items() if path.startswith(f"{_COMM_OVERLAP}.")}
    settings = {path: value for path, value in settings.items() if path not in overlaps}
    # Bridge shards the optimizer if either of the two asks for it; its own recipes set the gather in both.
    settings["optimizer.use_distributed_optimizer"] = layout.use_distributed_optimizer
    settings["optimizer.overlap_param_gather"] = layout.overlap_param_gather
    settings |= _bridge_companions(layout)
    if not any(overlaps.values()):
        # Without a CommOverlapConfig only `ddp` counts; with one, its defaults would win over `ddp`.
        return {**settings, _COMM_OVERLAP: None}
    return {
        **settings,
        **overlaps,
        f"{_COMM_OVERLAP}.batch_p2p_comm": not layout.overlap_p2p_comm,
        f"{_COMM_OVERLAP}.overlap_grad_reduce": layout.overlap_grad_reduce,
        f"{_COMM_OVERLAP}.overlap_param_gather": layout.overlap_param_gather,
        # A recipe's user-buffer preset belongs to its own tp and micro-batch.
        f"{_COMM_OVERLAP}.tp_comm_overlap_cfg": None,
    }


def _bridge_companions(layout: Layout) -> dict[str, Any]:
    """What Bridge wants beside the knobs: training/config.py, models/gpt_provider.py, utils/cuda_graph.py."""
    fsdp = layout.use_megatron_fsdp
    companions: dict[str, Any] = {
        **{f"model.{name}": value for name, value in _OLDER_GRAPHS.items()},
        "model.cpu_offloading": layout.cpu_offloading_num_layers > 0,
        "dist.use_megatron_fsdp": fsdp,
        "ddp.fsdp_manual_registration": fsdp and layout.nccl_ub,
        # Where weights are sharded, no GPU holds them whole, not even while they are made.
        "model.init_model_with_meta_device": fsdp
        and layout.data_parallel_sharding_strategy == "optim_grads_params",
    }
    if fsdp:
        companions["checkpoint.ckpt_format"] = "fsdp_dtensor"
    if layout.cuda_graph_impl != "none":
        companions |= {"model.use_te_rng_tracker": True, "rng.te_rng_tracker": True}
    if is_full_iteration(layout):
        companions["rerun_state_machine.check_for_nan_in_loss"] = False
    return companions


def bridge_changes(layout: Layout, base: Layout | None) -> dict[str, Any]:
    """The part of `bridge_settings` that a recipe with the layout `base` lacks; all of it without one."""
    wanted = bridge_settings(layout)
    if base is None:
        return wanted
    if layout == base:
        return {}
    present = bridge_settings(base)
    changed = {path for path, value in wanted.items() if path not in present or present[path] != value}
    if layout.pp > 1 or base.pp > 1:
        # Bridge places the layers anew, by a table of its own, where the stages change and no placement is stated.
        changed.add(_PLACEMENT)
    if base.use_megatron_fsdp and not layout.use_megatron_fsdp:
        wanted["checkpoint.ckpt_format"] = "torch_dist"
        changed.add("checkpoint.ckpt_format")
    for group in _TOGETHER:
        if changed.intersection(group):
            changed.update(group)
    # Bridge chooses overlaps by these wherever the recipe leaves them open, so then all are stated; with them those
    # of `ddp`, which a recipe may set to what Bridge's choice has replaced until now.
    deciding = ("tp", "pp", "vpp", "cp", "use_distributed_optimizer", "use_megatron_fsdp")
    if any(_is_overlap(path) for path in changed) or _differ(layout, base, deciding):
        changed |= {path for path in wanted if _is_overlap(path)}
    return {path: value for path, value in wanted.items() if path in changed}


def _differ(layout: Layout, base: Layout, knobs: tuple[str, ...]) -> bool:
    return any(getattr(layout, knob) != getattr(base, knob) for knob in knobs)


def bridge_words(spec: TrialSpec, recipe_layout: Layout | None = None) -> list[str]:
    """The override as words of run_recipe.py's command line, `++KEY=VALUE`; see `export`."""
    changes = with_class(bridge_overrides(spec, recipe_layout))
    return [f"++{path}={_hydra(value)}" for path, value in changes.items()]


def bridge_overrides(spec: TrialSpec, recipe_layout: Layout | None) -> dict[str, Any]:
    """The fields to set so that a recipe with the layout `recipe_layout` trains with the trial's; all without one."""
    changes = bridge_changes(spec.layout, recipe_layout)
    if recipe_layout is None and not spec.workload.model.is_moe:
        changes = {path: value for path, value in changes.items() if path not in expert_metadata("megatron")}
    # Always pinned: Bridge's benchmark recipes rescale it with dp, which would change the training.
    changes["train.global_batch_size"] = spec.workload.global_batch_size
    return changes


def with_class(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Name the class of `comm_overlap`: where a recipe has None, Bridge builds it from the fields."""
    if any(path.startswith(f"{_COMM_OVERLAP}.") for path in changes):
        return {**changes, f"{_COMM_OVERLAP}._target_": _COMM_OVERLAP_CLASS}
    return dict(changes)


def _is_overlap(path: str) -> bool:
    return path.split(".")[0] == _COMM_OVERLAP or path in _DATA_OVERLAPS


def _hydra(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    # Hydra's grammar has a meaning for other characters, those of a pipeline's layout among them.
    return str(value) if re.fullmatch(r"[\w.+-]*", str(value)) else f'"{value}"'


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by `group.name` as a mapping of groups, as Bridge's YAML has them."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        group, _, name = path.partition(".")
        if name:
            tree.setdefault(group, {})[name] = value
        else:
            tree[group] = value
    return tree


def bridge_python(changes: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """A Python module whose `apply` sets the fields on a ConfigContainer, and the variables in the environment."""
    overlap = any(path.startswith(f"{_COMM_OVERLAP}.") for path in changes)
    module, _, name = _COMM_OVERLAP_CLASS.rpartition(".")
    lines = ["import os", ""] if environment else []
    variables = [f"    {name!r}: {value!r}," for name, value in environment.items()]
    lines += [f"from {module} import {name}"] if overlap else []
    lines += ["from megatron.bridge.training.config import ConfigContainer", ""]
    lines += ["ENVIRONMENT = {", *variables, "}", "", ""] if environment else [""]
    lines += ["def apply(cfg: ConfigContainer) -> ConfigContainer:", '    """Select the measured layout."""']
    # Read when CUDA starts, which is after the recipe is built; a recipe's own env_vars do not replace them.
    lines += ["    os.environ.update(ENVIRONMENT)"] if environment else []
    if overlap:
        lines += [
            "    if cfg.comm_overlap is None:",
            f"        cfg.comm_overlap = {name}(tp_comm_overlap=False)",
        ]
    lines += [f"    cfg.{path} = {value!r}" for path, value in changes.items()]
    return "\n".join([*lines, "    return cfg", ""])
