"""The contract of a trial: the only thing that crosses a process boundary.

A launcher writes `spec.json`; the program reads it, writes `heartbeat.json` while it runs, a record for each rank,
and `result.json` at the end, also on an error. Nothing else passes between them: a program needs this module and
the nouns in its records, no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.files import STRICT
from tuner.trial.program import Program

SCHEMA_VERSION = 1


class Outcome(StrEnum):
    """How a trial ended. Values are only ever added."""

    COMPLETED = "completed"
    OOM = "oom"
    INVALID = "invalid"
    HANG = "hang"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"
    COMMUNICATION = "communication"
    NAN = "nan"
    INFRASTRUCTURE = "infrastructure"
    INTERRUPTED = "interrupted"


Phase = Literal[
    "startup", "build", "warmup", "memory", "forward", "backward", "optimizer", "measure", "teardown"
]
"""Where a rank was: imports and rendezvous, model build, untimed steps, the accounted step, timed steps, the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """How long a trial measures."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    warmup_steps: int = 3
    """Optimizer steps that never count; at least 3, since the second holds the peak (Adam's state comes with the
    first). Where the times still fall after them, more steps are found to be warm-up."""
    min_steps: int = 5
    """Steps that are timed at least, behind all warm-up."""
    max_steps: int = 20
    """Steps behind the least warm-up at most, or twice `min_steps` where more warm-up is found."""
    target_relative_interval: float = 0.02
    """Stop once the 95% interval of the median step is within plus or minus this share of it."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 3:
            raise ValueError(
                f"warmup_steps must be at least 3, not {self.warmup_steps}: a layout counts as feasible only "
                "after 3 optimizer steps"
            )
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"min_steps ({self.min_steps}) must lie in 1..max_steps ({self.max_steps})")
        if not 0 < self.target_relative_interval < 1:
            raise ValueError(
                f"target_relative_interval must lie between 0 and 1, not {self.target_relative_interval}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a trial may take, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    startup_s: float = 600.0
    """From the start to the end of the first optimizer step: imports, rendezvous, build, just-in-time compilation."""
    step_s: float = 300.0
    """Between two heartbeats after that; longer is a hang."""
    trial_s: float = 1800.0
    """The whole trial."""

    def __post_init__(self) -> None:
        for name in ("startup_s", "step_s", "trial_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything a program needs to run one trial."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema_version: int = SCHEMA_VERSION
    sweep: str
    number: int
    """The trial's number in its sweep, from 0."""
    attempt: int = 1
    workload: Workload
    cluster: Cluster
    layout: Layout
    program: Program = "megatron_core"
    """A program of megatune by name, or any other."""
    measurement: Measurement = field(default_factory=Measurement)
    limits: Limits = field(default_factory=Limits)
    seed: int = 1234
    """Of the weights, the mock tokens and the dropout."""
    give_up_above_ms: float | None = None
    """The trial may end as too slow once the lower end of its interval is above this; None runs it to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a failing rank saw, in its own words."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: str
    """The exception's qualified name, `torch.OutOfMemoryError`."""
    message: str
    traceback: str
    time_s: float
    """Seconds since the epoch: the earliest of many is the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRecord:
    """What one rank reports, at its end or at its failure."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: int
    host: str
    phase: Phase
    """Where it was at the end."""
    step: int
    """Optimizer steps finished."""
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Rank 0's sign of life."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phase: Phase
    step: int
    """Optimizer steps finished, warm-up included."""
    time_s: float
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """Where the trial's wall clock went, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    startup_s: float = 0.0
    """From the launcher's start to the process group."""
    build_s: float = 0.0
    warmup_s: float = 0.0
    measure_s: float = 0.0
    total_s: float = 0.0
    """Launcher's start to the end of the last process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What a completed trial measured."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step_times_ms: tuple[float, ...]
    """Every timed step: the slowest rank's, synchronised."""
    step_time_ms: float
    """Their median."""
    step_time_low_ms: float
    """Lower end of the bootstrap 95% interval of the median."""
    step_time_high_ms: float
    warmup_times_ms: tuple[float, ...] = ()
    """The steps before the timed ones, those that were found to be warm-up included."""
    outliers: tuple[int, ...] = ()
    """Places in `step_times_ms` of steps far from the median; they stay in it."""
    losses: tuple[float, ...]
    """One an optimizer step, warm-up included."""
    grad_norms: tuple[float, ...]
    tokens_per_s_per_gpu: float
    model_tflops_per_s_per_gpu: float
    mfu: float | None
    """Share of the GPU's dense peak of the precision; None where the cluster does not state it."""
    peak_allocated_gib: float
    """The worst rank's."""
    peak_reserved_gib: float | None
    """The worst rank's; None on CPU, where nothing is reserved."""

    def __post_init__(self) -> None:
        for name in ("step_time_ms", "step_time_low_ms", "step_time_high_ms", "peak_allocated_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What the machine did while the steps were timed; None where it does not tell."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples: int
    power_w: float | None = None
    """Mean, of all the trial's GPUs together."""
    energy_j_per_token: float | None = None
    clock_mhz: float | None = None
    """Mean, of the GPUs' SM clocks, or of the CPU's cores."""
    lowest_clock_mhz: float | None = None
    temperature_c: float | None = None
    """The hottest GPU's, at its hottest."""
    throttle_reasons: tuple[str, ...] = ()
    """NVML's names, without those that are no trouble (idle, an application's own clocks)."""
    foreign_memory_gib: float | None = None
    """The most that processes other than the trial's held on one of its GPUs."""
    foreign_load: float | None = None
    """Cores that processes other than the trial's kept busy, on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """How a trial ended, with its evidence: the record of truth."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema_version: int = SCHEMA_VERSION
    outcome: Outcome
    reason: str
    """One line: what happened, where, and what to do."""
    phase: Phase | None = None
    rank: int | None = None
    """The first failing rank."""
    metrics: Metrics | None = None
    """Present exactly if the outcome is completed."""
    slower_than_ms: float | None = None
    """A lower bound of the step time, where the trial ended before it measured one."""
    telemetry: Telemetry | None = None
    suspicions: tuple[str, ...] = ()
    """Why the measurement is not to be trusted, a line each: the machine was throttled or shared."""
    ranks: tuple[RankRecord, ...] = ()
    durations: Durations = field(default_factory=Durations)
    versions: Mapping[str, str] = field(default_factory=dict)
    """torch, megatron-core, transformer-engine, CUDA, NCCL, driver, python, megatune."""
    device_name: str = ""
    finished_at: str = ""
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        if (self.outcome is Outcome.COMPLETED) != (self.metrics is not None):
            raise ValueError("metrics are present exactly if the outcome is completed")
        if self.slower_than_ms is not None and (self.metrics is not None or self.slower_than_ms <= 0):
            raise ValueError("slower_than_ms is above 0, and stands only where there are no metrics")


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """The paths of one trial: no other place spells them."""

    path: Path

    @property
    def spec(self) -> Path:
        """The TrialSpec."""
        return self.path / "spec.json"

    @property
    def result(self) -> Path:
        """The TrialResult."""
        return self.path / "result.json"

    @property
    def source(self) -> Path:
        """Why the trial was chosen (tuner.trial.finished.TrialSource)."""
        return self.path / "source.json"

    @property
    def heartbeat(self) -> Path:
        """The Heartbeat."""
        return self.path / "heartbeat.json"

    @property
    def plan(self) -> Path:
        """The launcher's plan, with the command that reruns the trial."""
        return self.path / "plan.json"

    @property
    def telemetry(self) -> Path:
        """What the launcher saw of the machine, a sample a line."""
        return self.path / "telemetry.jsonl"

    @property
    def log(self) -> Path:
        """The folder of the ranks' output."""
        return self.path / "log"

    @property
    def ranks(self) -> Path:
        """The folder of the RankRecords."""
        return self.path / "ranks"

    def rank_record(self, rank: int) -> Path:
        """The RankRecord of a rank."""
        return self.ranks / f"rank{rank:05d}.json"

    def set_aside(self, attempt: int) -> Path:
        """Where the files of an earlier attempt are kept, from 1."""
        return self.path / f"attempt-{attempt}"
