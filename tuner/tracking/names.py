"""The names in MLflow: each parameter, metric and tag with its meaning, and where its value comes from.

docs/mlflow.md repeats these tables, and a test checks that both agree. The names never change, so that sweeps of
different months can be compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter

from tuner.core.layout import Layout, data_parallel_size, expert_data_parallel_size, num_microbatches
from tuner.trial.contract import TrialSpec
from tuner.trial.program import program_name


@dataclass(frozen=True, slots=True)
class Fact:
    """The name, meaning and value of one parameter of a trial's MLflow run; every trial has all parameters."""

    name: str
    meaning: str
    value: Callable[[TrialSpec], object]
    """Computes the parameter from the trial's spec; MLflow stores it as text."""


@dataclass(frozen=True, slots=True)
class Measure:
    """The name, meaning and source of one metric of an MLflow run.

    If a trial did not measure the metric, its MLflow run lacks it, rather than having the value 0.
    """

    name: str
    meaning: str
    path: str
    """The attribute of TrialResult that is logged, as in `metrics.losses`. A tuple is logged as a series, one MLflow
    step per value."""
    is_count: bool = False
    """Whether the number of values in the attribute's tuple is logged, instead of the values themselves."""


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
    Fact("num_microbatches", "derived: micro-batches per rank and optimizer step", _num_microbatches),
    Fact("model", "name of the model", attrgetter("workload.model.name")),
    Fact("seq_length", "tokens per sample", attrgetter("workload.seq_length")),
    Fact("global_batch_size", "samples per optimizer step", attrgetter("workload.global_batch_size")),
    Fact("precision", "training precision", attrgetter("workload.precision")),
    Fact(
        "fp8_param",
        "whether the weights of linear layers exist in fp8 only",
        attrgetter("workload.fp8_param"),
    ),
    Fact(
        "grad_reduce_in_fp32",
        "whether gradients are added up in fp32",
        attrgetter("workload.grad_reduce_in_fp32"),
    ),
    Fact(
        "moe_router_force_load_balancing",
        "whether tokens are routed at random, which lowers time and memory",
        attrgetter("workload.moe_router_force_load_balancing"),
    ),
    Fact("cluster", "name of the cluster", attrgetter("cluster.name")),
    Fact("gpu", "name of the GPU in the cluster's description", attrgetter("cluster.gpu.name")),
    Fact(
        "gpu_memory_gib", "memory that a process may allocate, in GiB", attrgetter("cluster.gpu.memory_gib")
    ),
    Fact("nodes", "number of machines", attrgetter("cluster.nodes")),
    Fact("gpus_per_node", "GPUs per machine", attrgetter("cluster.gpus_per_node")),
    Fact("world_size", "GPUs in all", attrgetter("cluster.world_size")),
    Fact("give_up_above_ms", "step time above which the trial could end early, in ms, or `none`", _give_up),
    Fact("program", "the program that ran in the trial", lambda spec: program_name(spec.program)),
    Fact("seed", "seed of weights, tokens and dropout", attrgetter("seed")),
)
"""The parameters of a trial's MLflow run."""

METRICS: tuple[Measure, ...] = (
    Measure(
        "step/time_ms",
        "each timed step, as long as its slowest rank, in ms; a series",
        "metrics.step_times_ms",
    ),
    Measure("step/time_median_ms", "median step time, in ms; the sweep minimises it", "metrics.step_time_ms"),
    Measure("step/time_low_ms", "lower end of the median's 95% interval, in ms", "metrics.step_time_low_ms"),
    Measure(
        "step/time_high_ms", "upper end of the median's 95% interval, in ms", "metrics.step_time_high_ms"
    ),
    Measure(
        "step/warmup_time_ms", "each step before the timed ones, in ms; a series", "metrics.warmup_times_ms"
    ),
    Measure(
        "step/outliers",
        "number of timed steps far from the median; the median includes them",
        "metrics.outliers",
        is_count=True,
    ),
    Measure(
        "step/slower_than_ms",
        "lower bound of the step time, in ms, of a trial that ended before it measured one",
        "slower_than_ms",
    ),
    Measure("throughput/tokens_per_s_per_gpu", "tokens per second and GPU", "metrics.tokens_per_s_per_gpu"),
    Measure(
        "throughput/model_tflops_per_s_per_gpu",
        "model TFLOP/s per GPU, without recomputation",
        "metrics.model_tflops_per_s_per_gpu",
    ),
    Measure("throughput/mfu", "share of the GPU's dense peak, 0 to 1", "metrics.mfu"),
    Measure(
        "memory/peak_allocated_gib",
        "peak of the rank that allocates most, in GiB",
        "metrics.peak_allocated_gib",
    ),
    Measure(
        "memory/peak_reserved_gib",
        "peak of the rank that reserves most, in GiB; CUDA only",
        "metrics.peak_reserved_gib",
    ),
    Measure("train/loss", "loss of each optimizer step, warm-up included; a series", "metrics.losses"),
    Measure("train/grad_norm", "gradient norm of each optimizer step; a series", "metrics.grad_norms"),
    Measure("energy/joules_per_token", "energy of the GPUs per token, in J", "telemetry.energy_j_per_token"),
    Measure("machine/power_w", "mean power of all GPUs together, in W", "telemetry.power_w"),
    Measure("machine/clock_mhz", "mean clock of the GPUs, or of the CPU, in MHz", "telemetry.clock_mhz"),
    Measure("machine/lowest_clock_mhz", "lowest clock seen, in MHz", "telemetry.lowest_clock_mhz"),
    Measure("machine/temperature_c", "highest temperature of any GPU, in °C", "telemetry.temperature_c"),
    Measure(
        "machine/foreign_memory_gib",
        "most memory that other processes held on one GPU, in GiB",
        "telemetry.foreign_memory_gib",
    ),
    Measure("machine/foreign_load", "CPU cores that other processes kept busy", "telemetry.foreign_load"),
    Measure("duration/startup_s", "from the launch to the process group, in s", "durations.startup_s"),
    Measure("duration/build_s", "building the model, in s", "durations.build_s"),
    Measure("duration/warmup_s", "untimed steps, in s", "durations.warmup_s"),
    Measure("duration/measure_s", "timed steps, in s", "durations.measure_s"),
    Measure("duration/total_s", "from the launch to the end of the last process, in s", "durations.total_s"),
)
"""The metrics of a trial's MLflow run."""

BEST_METRICS: tuple[Measure, ...] = (
    Measure("best/step_time_ms", "median step time, in ms", "metrics.step_time_ms"),
    Measure("best/tokens_per_s_per_gpu", "tokens per second and GPU", "metrics.tokens_per_s_per_gpu"),
    Measure("best/model_tflops_per_s_per_gpu", "model TFLOP/s per GPU", "metrics.model_tflops_per_s_per_gpu"),
    Measure(
        "best/peak_allocated_gib",
        "peak of the rank that allocates most, in GiB",
        "metrics.peak_allocated_gib",
    ),
)
"""The metrics of the sweep's MLflow run: figures of the best trial so far. One point is logged after each trial, with
that trial's number as MLflow's step."""

KIND = "megatune.kind"
SWEEP = "megatune.sweep"
SWEEP_ID = "megatune.sweep_id"
TRIAL = "megatune.trial"
RECORD = "megatune.record"

RUN_TAGS: Mapping[str, str] = {
    KIND: "`sweep` or `trial`",
    SWEEP: "name of the sweep",
    SWEEP_ID: "identity of the results folder, from its file `sweep_id`",
    "megatune.version": "version of megatune that logged the run; absent if it is not installed as a package",
    "mlflow.source.git.commit": "commit of the working directory; absent if that is no git repository",
    "mlflow.note.content": "sweep: the summary; trial: outcome and reason",
}
"""The tags that the sweep's MLflow run and every trial's MLflow run have, with their meanings."""

SWEEP_TAGS: Mapping[str, str] = {
    "megatune.best_trial": "number of the best trial so far",
    "megatune.best_layout": "layout of the best trial so far",
}
"""The tags that only the sweep's MLflow run has, with their meanings."""

TRIAL_TAGS: Mapping[str, str] = {
    "mlflow.parentRunId": "id of the sweep's run",
    TRIAL: "number of the trial",
    "megatune.attempt": "number of the attempt at the trial, from 1",
    "megatune.layout": "layout in short",
    "megatune.outcome": "`completed`, `oom`, `invalid`, `hang`, `timeout`, ...",
    "megatune.reason": "reason of the outcome in one line",
    "megatune.phase": "phase in which a failed trial was",
    "megatune.rank": "first rank that failed",
    "megatune.source": "`baseline`, `seed`, `sampler`, `repeat` (of a suspect trial), `canary` or `final`",
    "megatune.source_note": "table that a seed comes from, and how the seed was moved",
    "megatune.suspicions": "reasons not to trust the measurement",
    "megatune.throttle_reasons": "reasons why the GPUs were slowed down, in NVML's names",
    "megatune.config_hash": "hash of workload, cluster, layout and program; equal for equal configurations",
    "megatune.program": "the program that ran in the trial",
    "megatune.device": "name of the GPU that the trial ran on",
    "megatune.folder": "path of the trial's folder on the tuner's machine",
    "megatune.versions.*": "versions of torch, megatron-core, CUDA, NCCL, driver, ...",
    RECORD: "hash of the logged record; it is set last, so that a run without it is incomplete",
}
"""The tags that only the trials' MLflow runs have, with their meanings."""
