"""The override: a measured layout in the form that a launcher takes, with the evidence on top. Pure."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

import yaml

from tuner.analysis.figures import Figures
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.files import to_data
from tuner.frameworks.megatron_fields import (
    expert_metadata,
    is_full_iteration,
    megatron_fields,
    megatron_lm_arguments,
)
from tuner.frameworks.megatron_lm.trial_command import by_argument, with_layout
from tuner.trial.contract import TrialSpec
from tuner.trial.program import MegatronLm, Program


class Format(StrEnum):
    """What an override is written for."""

    BRIDGE_CLI = "bridge-cli"
    BRIDGE_PYTHON = "bridge-python"
    BRIDGE_YAML = "bridge-yaml"
    MEGATRON_LM = "megatron-lm"
    JSON = "json"

    @classmethod
    def of(cls, program: Program) -> "Format":
        """What fits the program that was measured."""
        return cls.MEGATRON_LM if isinstance(program, MegatronLm) else cls.BRIDGE_CLI


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


def export(
    format: Format, spec: TrialSpec, figures: Figures, rerun_command: str, recipe_layout: Layout | None = None
) -> str:
    """Write the override that selects a measured layout, ending with a newline.

    Args:
        format: what it is for.
        spec: the measured trial's.
        figures: its measurements; they head the text as comments (in JSON as fields).
        rerun_command: the shell command that runs the trial again.
        recipe_layout: the layout that the recipe has now: only what differs is written; None writes all.
    """
    environment = _environment(format, spec)
    changes = _overrides(spec, recipe_layout)
    if format is Format.JSON:
        return _json(spec, figures, rerun_command, changes, environment)
    header = _evidence(spec, figures, rerun_command)
    if format is Format.MEGATRON_LM:
        lines = [*header, *_megatron_lm_usage(spec, recipe_layout, environment)]
        return _comments(lines) + _megatron_lm(spec, recipe_layout)
    if format is Format.BRIDGE_PYTHON:
        return _comments(header) + _bridge_python(changes, environment)
    lines = [*header, *_environment_block(environment)]
    if format is Format.BRIDGE_YAML:
        lines.append("for process_config_with_overrides(config, config_filepath=<this file>)")
        return _comments(lines) + yaml.safe_dump(_nested(_with_class(changes)), sort_keys=False)
    lines += [
        "append to the command line of run_recipe.py",
        "++ and not the plain form: it also works where the recipe's model config is nested or lacks the key",
    ]
    return _comments(lines) + _continued(bridge_words(spec, recipe_layout))


def _environment(format: Format, spec: TrialSpec) -> dict[str, str]:
    """A recipe of Bridge may state any of the variables, so that all are stated over it."""
    if spec.cluster.device != "cuda":
        return {}
    return cuda_environment(spec.layout, spec.cluster, complete=format is not Format.MEGATRON_LM)


def bridge_words(spec: TrialSpec, recipe_layout: Layout | None = None) -> list[str]:
    """The override as words of run_recipe.py's command line, `++KEY=VALUE`; see `export`."""
    changes = _with_class(_overrides(spec, recipe_layout))
    return [f"++{path}={_hydra(value)}" for path, value in changes.items()]


def _overrides(spec: TrialSpec, recipe_layout: Layout | None) -> dict[str, Any]:
    changes = bridge_changes(spec.layout, recipe_layout)
    if recipe_layout is None and not spec.workload.model.is_moe:
        changes = {path: value for path, value in changes.items() if path not in expert_metadata("megatron")}
    # Always pinned: Bridge's benchmark recipes rescale it with dp, which would change the training.
    changes["train.global_batch_size"] = spec.workload.global_batch_size
    return changes


def _evidence(spec: TrialSpec, figures: Figures, rerun_command: str) -> list[str]:
    metrics, workload, cluster = figures.metrics, spec.workload, spec.cluster
    mfu = "" if metrics.mfu is None else f", MFU {metrics.mfu:.1%}"
    reserved = "" if metrics.peak_reserved_gib is None else f", {metrics.peak_reserved_gib:.4g} GiB reserved"
    versions = ", ".join(f"{name} {text}" for name, text in figures.versions.items())
    return [
        f"megatune: trial t{figures.trial:04d} of sweep {spec.sweep}",
        f"{workload.model.name}, {workload.seq_length} tokens a sample, "
        f"global batch {workload.global_batch_size}, {workload.precision}, "
        f"on {cluster.world_size} GPUs of {cluster.name}",
        f"layout: {spec.layout.label()}",
        f"step time: {metrics.step_time_ms:,.2f} ms (median; 95% interval {metrics.step_time_low_ms:,.2f} to "
        f"{metrics.step_time_high_ms:,.2f} ms)",
        f"throughput: {metrics.tokens_per_s_per_gpu:,.1f} tokens/s/GPU, "
        f"{metrics.model_tflops_per_s_per_gpu:.4g} model TFLOP/s/GPU{mfu}",
        f"peak memory: {metrics.peak_allocated_gib:.4g} GiB allocated{reserved} (worst rank)",
        f"how sure: {figures.certainty_sentence()}",
        f"gain: {figures.gain_sentence()}",
        f"measured on {figures.device_name or cluster.gpu.name} with {versions or 'unrecorded versions'}",
        f"run it again: {rerun_command}",
    ]


def _environment_block(environment: Mapping[str, str]) -> list[str]:
    """Bridge and Megatron-LM take variables from the shell, where they win over those of a recipe."""
    lines = [f"    export {name}={value}" for name, value in environment.items()]
    return ["the job's environment, which wins over a recipe's env_vars:", *lines] if lines else []


def _comments(lines: list[str]) -> str:
    # A line break of any kind in a name must not turn the rest of it into code.
    clean = ("".join(letter if letter.isprintable() else " " for letter in line) for line in lines)
    return "".join(f"# {line}\n" for line in clean)


def _with_class(changes: Mapping[str, Any]) -> dict[str, Any]:
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


def _continued(arguments: list[str]) -> str:
    return " \\\n".join(shlex.quote(argument) for argument in arguments) + "\n"


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        group, _, name = path.partition(".")
        if name:
            tree.setdefault(group, {})[name] = value
        else:
            tree[group] = value
    return tree


def _bridge_python(changes: Mapping[str, Any], environment: Mapping[str, str]) -> str:
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


def _megatron_lm_usage(spec: TrialSpec, base: Layout | None, environment: Mapping[str, str]) -> list[str]:
    layout, lines = spec.layout, _environment_block(environment)
    if isinstance(spec.program, MegatronLm):
        return [
            *lines,
            "behind torchrun and its arguments: the command with the layout in the place of its own",
        ]
    lines.append("append to the arguments of pretrain_gpt.py")
    gone = {} if base is None else megatron_lm_arguments(base).keys() - megatron_lm_arguments(layout).keys()
    return lines + [f"and remove: {flag}" for flag in sorted(gone)]


def _megatron_lm(spec: TrialSpec, base: Layout | None) -> str:
    if isinstance(spec.program, MegatronLm):
        words = with_layout(spec.program.megatron_lm, spec.layout, spec.workload)
        return " \\\n".join(map(shlex.join, by_argument(words))) + "\n"
    present = {} if base is None else megatron_lm_arguments(base)
    wanted = {
        flag: values
        for flag, values in megatron_lm_arguments(spec.layout).items()
        if present.get(flag) != values
    }
    if base is None and not spec.workload.model.is_moe:
        wanted = {flag: values for flag, values in wanted.items() if flag not in expert_metadata("flag")}
    wanted["--global-batch-size"] = [str(spec.workload.global_batch_size)]
    return " \\\n".join(shlex.join([flag, *values]) for flag, values in wanted.items()) + "\n"


def _json(
    spec: TrialSpec,
    figures: Figures,
    rerun_command: str,
    changes: Mapping[str, Any],
    environment: Mapping[str, str],
) -> str:
    comparisons = {"fastest_other_layout": figures.rival, "baseline": figures.baseline}
    data = {
        "sweep": spec.sweep,
        "trial": figures.trial,
        "workload": to_data(spec.workload),
        "cluster": spec.cluster.name,
        "world_size": spec.cluster.world_size,
        "layout": to_data(spec.layout),
        "bridge": changes,
        "megatron_lm": megatron_lm_arguments(spec.layout),
        "environment": environment,
        "metrics": to_data(figures.metrics),
        "timed_steps": len(figures.metrics.step_times_ms),
        **{
            name: asdict(other) | {"is_tie": other.is_tie} if other else None
            for name, other in comparisons.items()
        },
        "device_name": figures.device_name,
        "versions": dict(figures.versions),
        "rerun_command": rerun_command,
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
