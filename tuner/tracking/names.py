"""What a trial's run in MLflow holds: every name, its meaning, and where its value comes from. Pure.

The tables here are the one place that names what is logged; docs/mlflow.md repeats them, and a test holds the
two together. Names are stable, so that the sweeps of different nights compare.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from tuner.core.layout import Layout, data_parallel_size, expert_data_parallel_size, num_microbatches
from tuner.files import to_data
from tuner.trial.contract import TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial
from tuner.trial.program import program_name

MAX_TEXT = 5000
"""Characters of a tag: MLflow cuts tags beyond 8000 silently."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A parameter of a trial's run: the same keys on every run."""

    name: str
    meaning: str
    value: Callable[[TrialSpec], object]


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric; left out where the trial did not measure it, never 0."""

    name: str
    meaning: str
    path: str
    """Where in the TrialResult; a tuple there is a series, its place the step."""
    is_count: bool = False
    """The tuple's length instead."""


def _give_up(spec: TrialSpec) -> object:
    return "none" if spec.give_up_above_ms is None else spec.give_up_above_ms


def _dp(spec: TrialSpec) -> int:
    layout = spec.layout
    return data_parallel_size(spec.cluster.world_size, layout.tp, layout.pp, layout.cp)


def _edp(spec: TrialSpec) -> int:
    layout = spec.layout
    return expert_data_parallel_size(spec.cluster.world_size, layout.pp, layout.ep, layout.etp)


def _num_microbatches(spec: TrialSpec) -> int:
    return num_microbatches(spec.workload.global_batch_size, spec.layout.micro_batch_size, _dp(spec))


PARAMETERS: tuple[Fact, ...] = (
    *(
        Fact(
            knob.metadata["megatron"].rsplit(".", 1)[-1],
            f"knob `{knob.name}`",
            attrgetter(f"layout.{knob.name}"),
        )
        for knob in fields(Layout)
    ),
    Fact("data_parallel_size", "derived: world / (tp*pp*cp)", _dp),
    Fact("expert_data_parallel_size", "derived: world / (pp*ep*etp)", _edp),
    Fact("num_microbatches", "derived: a rank's micro-batches in one optimizer step", _num_microbatches),
    Fact("model", "name of the model", attrgetter("workload.model.name")),
    Fact("seq_length", "tokens a sample", attrgetter("workload.seq_length")),
    Fact("global_batch_size", "samples an optimizer step", attrgetter("workload.global_batch_size")),
    Fact("precision", "training precision", attrgetter("workload.precision")),
    Fact("fp8_param", "weights of linear layers in fp8 alone", attrgetter("workload.fp8_param")),
    Fact("grad_reduce_in_fp32", "gradients added up in fp32", attrgetter("workload.grad_reduce_in_fp32")),
    Fact(
        "moe_router_force_load_balancing",
        "tokens routed at random: flatters time and memory",
        attrgetter("workload.moe_router_force_load_balancing"),
    ),
    Fact("cluster", "name of the cluster", attrgetter("cluster.name")),
    Fact("gpu", "GPU that the cluster states", attrgetter("cluster.gpu.name")),
    Fact("gpu_memory_gib", "memory a process may allocate", attrgetter("cluster.gpu.memory_gib")),
    Fact("nodes", "machines", attrgetter("cluster.nodes")),
    Fact("gpus_per_node", "GPUs a machine", attrgetter("cluster.gpus_per_node")),
    Fact("world_size", "GPUs in all", attrgetter("cluster.world_size")),
    Fact("give_up_above_ms", "bound above which the trial could end early, in ms, or `none`", _give_up),
    Fact("program", "what ran in the trial", lambda spec: program_name(spec.program)),
    Fact("seed", "of weights, tokens and dropout", attrgetter("seed")),
)

METRICS: tuple[Measure, ...] = (
    Measure("step/time_ms", "every timed step, the slowest rank's, in ms; a series", "metrics.step_times_ms"),
    Measure("step/time_median_ms", "median step time, in ms: what is minimised", "metrics.step_time_ms"),
    Measure("step/time_low_ms", "lower end of the median's 95% interval, in ms", "metrics.step_time_low_ms"),
    Measure("step/time_high_ms", "upper end of it, in ms", "metrics.step_time_high_ms"),
    Measure(
        "step/warmup_time_ms",
        "every step before the timed ones, in ms; a series",
        "metrics.warmup_times_ms",
    ),
    Measure(
        "step/outliers", "timed steps far from the median; they stay in it", "metrics.outliers", is_count=True
    ),
    Measure(
        "step/slower_than_ms",
        "lower bound of the step time, in ms, where the trial ended before it measured one",
        "slower_than_ms",
    ),
    Measure("throughput/tokens_per_s_per_gpu", "tokens a second and GPU", "metrics.tokens_per_s_per_gpu"),
    Measure(
        "throughput/model_tflops_per_s_per_gpu",
        "model TFLOP/s a GPU, recompute not counted",
        "metrics.model_tflops_per_s_per_gpu",
    ),
    Measure("throughput/mfu", "share of the GPU's dense peak, 0 to 1", "metrics.mfu"),
    Measure("memory/peak_allocated_gib", "the worst rank's peak, in GiB", "metrics.peak_allocated_gib"),
    Measure(
        "memory/peak_reserved_gib",
        "the worst rank's peak reserved, in GiB; CUDA only",
        "metrics.peak_reserved_gib",
    ),
    Measure("train/loss", "loss of every optimizer step, warm-up included; a series", "metrics.losses"),
    Measure("train/grad_norm", "gradient norm of every optimizer step; a series", "metrics.grad_norms"),
    Measure("energy/joules_per_token", "energy of the GPUs a token, in J", "telemetry.energy_j_per_token"),
    Measure("machine/power_w", "mean power of all GPUs together, in W", "telemetry.power_w"),
    Measure("machine/clock_mhz", "mean clock of GPUs (or of the CPU), in MHz", "telemetry.clock_mhz"),
    Measure("machine/lowest_clock_mhz", "the lowest clock seen, in MHz", "telemetry.lowest_clock_mhz"),
    Measure("machine/temperature_c", "the hottest GPU at its hottest, in °C", "telemetry.temperature_c"),
    Measure(
        "machine/foreign_memory_gib",
        "the most that other processes held on one GPU, in GiB",
        "telemetry.foreign_memory_gib",
    ),
    Measure("machine/foreign_load", "cores that other processes kept busy", "telemetry.foreign_load"),
    Measure("duration/startup_s", "launch to the process group, in s", "durations.startup_s"),
    Measure("duration/build_s", "building the model, in s", "durations.build_s"),
    Measure("duration/warmup_s", "untimed steps, in s", "durations.warmup_s"),
    Measure("duration/measure_s", "timed steps, in s", "durations.measure_s"),
    Measure("duration/total_s", "launch to the end of the last process, in s", "durations.total_s"),
)

BEST_METRICS: tuple[Measure, ...] = (
    Measure("best/step_time_ms", "median step time, in ms", "metrics.step_time_ms"),
    Measure("best/tokens_per_s_per_gpu", "tokens a second and GPU", "metrics.tokens_per_s_per_gpu"),
    Measure("best/model_tflops_per_s_per_gpu", "model TFLOP/s a GPU", "metrics.model_tflops_per_s_per_gpu"),
    Measure("best/peak_allocated_gib", "the worst rank's peak, in GiB", "metrics.peak_allocated_gib"),
)
"""On the sweep's run: the best trial so far; the step is the number of the trial that was logged."""

KIND = "megatune.kind"
SWEEP = "megatune.sweep"
SWEEP_ID = "megatune.sweep_id"
TRIAL = "megatune.trial"
RECORD = "megatune.record"

RUN_TAGS: Mapping[str, str] = {
    KIND: "`sweep` or `trial`",
    SWEEP: "name of the sweep",
    SWEEP_ID: "identity of the results folder (its `sweep_id`)",
    "megatune.version": "version of megatune that logged the run, where it is installed",
    "mlflow.source.git.commit": "commit of the working directory, where that is a git repository",
    "mlflow.note.content": "sweep: the summary; trial: outcome and reason",
}
"""On the runs of the sweep and of its trials."""

SWEEP_TAGS: Mapping[str, str] = {
    "megatune.best_trial": "number of the best trial so far",
    "megatune.best_layout": "its layout",
}

TRIAL_TAGS: Mapping[str, str] = {
    "mlflow.parentRunId": "the sweep's run",
    TRIAL: "the trial's number",
    "megatune.attempt": "which attempt at it, from 1",
    "megatune.layout": "the layout in short",
    "megatune.outcome": "`completed`, `oom`, `invalid`, `hang`, `timeout`, ...",
    "megatune.reason": "why, in one line",
    "megatune.phase": "where a failed trial was",
    "megatune.rank": "the first failing rank",
    "megatune.source": "`baseline`, `seed`, `sampler`, `repeat` (of a suspect trial), `canary` or `final`",
    "megatune.source_note": "which table a seed comes from, how it was moved",
    "megatune.suspicions": "why the measurement is not to be trusted",
    "megatune.throttle_reasons": "why the GPUs were slowed down, in NVML's names",
    "megatune.config_hash": "of workload, cluster, layout and program: equal wherever the same was run",
    "megatune.program": "what ran in the trial",
    "megatune.device": "the GPU that was found",
    "megatune.folder": "the trial's folder on the controller",
    "megatune.versions.*": "versions of torch, megatron-core, CUDA, NCCL, driver, ...",
    RECORD: "hash of the logged record; set last, so a run without it is incomplete",
}


def config_hash(spec: TrialSpec) -> str:
    """A short hash of what was run: workload, cluster, layout and program, not the sweep or the trial."""
    parts = {name: to_data(getattr(spec, name)) for name in ("workload", "cluster", "layout")}
    return digest({**parts, "program": to_data(spec)["program"]})


def trial_parameters(spec: TrialSpec) -> dict[str, str]:
    """The parameters of a trial's run."""
    return {fact.name: str(fact.value(spec)) for fact in PARAMETERS}


def trial_metrics(result: TrialResult, measures: Iterable[Measure] = METRICS) -> list[tuple[str, float, int]]:
    """The metrics that a trial measured, as (name, value, step)."""
    return [
        (measure.name, float(value), step)
        for measure in measures
        for step, value in enumerate(_values(result, measure))
    ]


def _values(result: TrialResult, measure: Measure) -> tuple[float, ...]:
    value: Any = result
    for name in measure.path.split("."):
        value = None if value is None else getattr(value, name)
    if value is None:
        return ()
    if measure.is_count:
        return (len(value),)
    return value if isinstance(value, tuple) else (value,)


def trial_tags(spec: TrialSpec, row: FinishedTrial, folder: TrialFolder) -> dict[str, str]:
    """The tags of a trial's run that say what it was and how it ended; empty ones are left out."""
    result = row.result
    tags = {
        KIND: "trial",
        TRIAL: str(row.number),
        "megatune.attempt": str(spec.attempt),
        "megatune.layout": row.layout.label(),
        "megatune.outcome": result.outcome.value,
        "megatune.reason": result.reason,
        "megatune.phase": result.phase or "",
        "megatune.rank": "" if result.rank is None else str(result.rank),
        "megatune.source": row.source,
        "megatune.source_note": row.note,
        "megatune.suspicions": "; ".join(result.suspicions),
        "megatune.throttle_reasons": " ".join(result.telemetry.throttle_reasons if result.telemetry else ()),
        "megatune.config_hash": config_hash(spec),
        "megatune.program": program_name(spec.program),
        "megatune.device": result.device_name,
        "megatune.folder": str(folder.path.absolute()),
        "mlflow.note.content": f"**{result.outcome.value}** {result.reason}",
        **{f"megatune.versions.{name}": text for name, text in result.versions.items()},
    }
    return {name: clip(text) for name, text in tags.items() if text}


def digest(data: object) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def clip(text: str) -> str:
    """A text within MAX_TEXT, marked where it was cut."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 4] + " ..."
