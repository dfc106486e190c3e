"""Writes the override that selects a measured layout, with comments that state what was measured."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from tuner.analysis.figures import Figures
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.files import to_data
from tuner.frameworks.megatron_bridge.override import (
    bridge_overrides,
    bridge_python,
    bridge_words,
    bridge_yaml,
)
from tuner.frameworks.megatron_lm.arguments import megatron_lm_arguments
from tuner.frameworks.megatron_lm.override import megatron_lm_override, megatron_lm_usage
from tuner.printable import one_line, printable
from tuner.trial.contract import TrialSpec
from tuner.trial.program import MegatronLm, Program

_BRIDGE_CLI_USAGE = (
    "append to the command line of run_recipe.py",
    "++ and not the plain form: it also works where the recipe's model config is nested or lacks the key",
)
_BRIDGE_YAML_USAGE = "for process_config_with_overrides(config, config_filepath=<this file>)"


class Format(StrEnum):
    """The format of an override's text."""

    BRIDGE_CLI = "bridge-cli"
    BRIDGE_PYTHON = "bridge-python"
    BRIDGE_YAML = "bridge-yaml"
    MEGATRON_LM = "megatron-lm"
    JSON = "json"

    @classmethod
    def of(cls, program: Program) -> "Format":
        """Return the default format for an override of the program that a trial ran."""
        return cls.MEGATRON_LM if isinstance(program, MegatronLm) else cls.BRIDGE_CLI


def export(
    format: Format,
    spec: TrialSpec,
    figures: Figures,
    rerun_command: str,
    *,
    recipe_layout: Layout | None = None,
) -> str:
    """Return the text of the override that selects a measured layout; it ends with a newline.

    Args:
        format: The format to write.
        spec: The spec of the measured trial.
        figures: The layout's measurements, which are written as comments at the top, or in JSON as fields.
        rerun_command: The shell command that runs the trial again; it is written beside the measurements.
        recipe_layout: The layout that the user's recipe or command has now, so that only differences are written. None
            writes everything that selects the layout.
    """
    environment = _environment(format, spec)
    changes = bridge_overrides(spec, recipe_layout)
    if format is Format.JSON:
        return _json(spec, figures, rerun_command, changes=changes, environment=environment)
    header = _evidence(spec, figures, rerun_command)
    if format is Format.MEGATRON_LM:
        lines = [*header, *_environment_block(environment), *megatron_lm_usage(spec, recipe_layout)]
        return _comments(lines) + printable(megatron_lm_override(spec, recipe_layout))
    if format is Format.BRIDGE_PYTHON:
        return _comments(header) + bridge_python(changes, environment)
    lines = [*header, *_environment_block(environment)]
    if format is Format.BRIDGE_YAML:
        return _comments([*lines, _BRIDGE_YAML_USAGE]) + bridge_yaml(changes)
    words = bridge_words(spec, recipe_layout)
    return _comments([*lines, *_BRIDGE_CLI_USAGE]) + " \\\n".join(map(shlex.quote, words)) + "\n"


def _environment(format: Format, spec: TrialSpec) -> dict[str, str]:
    """Return the environment variables to set for the layout; empty for a job on CPU.

    For Bridge, they include variables whose knob has its default value, since a recipe may set other values.
    """
    if spec.cluster.device != "cuda":
        return {}
    return cuda_environment(spec.layout, spec.cluster, complete=format is not Format.MEGATRON_LM)


def _evidence(spec: TrialSpec, figures: Figures, rerun_command: str) -> list[str]:
    """Return lines that state the layout, its measurements, the machine, and how to measure it again."""
    metrics, workload, cluster = figures.metrics, spec.workload, spec.cluster
    mfu = "" if metrics.mfu is None else f", MFU {metrics.mfu:.1%}"
    reserved = "" if metrics.peak_reserved_gib is None else f", {metrics.peak_reserved_gib:.4g} GiB reserved"
    versions = ", ".join(f"{name} {text}" for name, text in figures.versions.items())
    return [
        f"megatune: trial t{figures.trial:04d} of sweep {spec.sweep}",
        f"{workload.model.name}, {workload.seq_length} tokens per sample, "
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
        *_without_transformer_engine(spec, figures),
        f"run it again: {rerun_command}",
    ]


def _without_transformer_engine(spec: TrialSpec, figures: Figures) -> list[str]:
    """Return a line that warns of a measurement without Transformer Engine on GPUs; empty if it was there."""
    if spec.cluster.device == "cpu" or not figures.versions or "transformer-engine" in figures.versions:
        return []
    return [
        "Transformer Engine was not installed: the layers were Torch's own, so step time and memory are not those of "
        "a job that has it"
    ]


def _environment_block(environment: Mapping[str, str]) -> list[str]:
    """Return lines for the user with shell commands that set environment variables; empty if there are none to set."""
    lines = [f"    export {name}={value}" for name, value in environment.items()]
    return ["the job's environment, which overrides a recipe's env_vars:", *lines] if lines else []


def _comments(lines: Iterable[str]) -> str:
    # A line break in a name, of any kind, must not turn the rest of the name into code.
    return "".join(f"# {one_line(line)}\n" for line in lines)


def _json(
    spec: TrialSpec,
    figures: Figures,
    rerun_command: str,
    *,
    changes: Mapping[str, Any],
    environment: Mapping[str, str],
) -> str:
    """Return a JSON object with the measurements, the layout, and the override for Bridge and for Megatron-LM.

    Args:
        spec: The spec of the measured trial.
        figures: The layout's measurements.
        rerun_command: The shell command that runs the trial again.
        changes: The override for Bridge, as values by path.
        environment: The environment variables that the layout needs.
    """
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
