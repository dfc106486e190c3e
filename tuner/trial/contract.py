"""The contract of a trial: the files through which the tuner, a launcher and a program speak, and nothing else.

A launcher writes `spec.json`. The program reads it, writes `heartbeat.json` while it runs, one record per rank, and
`result.json` at the end, after an error too. A program therefore imports only this module and the nouns in its records.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.pipeline_layout import parse as chunks_of_placement
from tuner.core.workload import Workload
from tuner.files import STRICT
from tuner.printable import OneLine
from tuner.trial.program import Program

SCHEMA_VERSION = 1
"""Version of the format of `spec.json` and `result.json`."""


class Outcome(StrEnum):
    """How a trial ended. Values may be added, but none is removed or renamed, so that old results stay readable."""

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
    UNEXPLAINED = "unexplained"


Phase = Literal[
    "startup", "build", "warmup", "memory", "forward", "backward", "optimizer", "measure", "teardown"
]
"""The part of a trial that a rank is in.

`startup` imports modules and joins the process group, `build` builds the model, `warmup` runs untimed steps, `memory`
runs the step whose memory is accounted, `measure` runs timed steps, `teardown` is the end. A failure within a step may
name the part of the step instead: `forward`, `backward` or `optimizer`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The number of steps that a trial runs and times."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    warmup_steps: int = 3
    """Optimizer steps that are never timed; at least 3, since the second step has the peak memory (the first creates
    Adam's state). If step times still fall after them, further steps count as warm-up.
    """
    min_steps: int = 5
    """The least number of timed steps, after all warm-up."""
    max_steps: int = 20
    """The largest number of steps after `warmup_steps`. If further steps count as warm-up, it is at least twice
    `min_steps`.
    """
    target_relative_interval: float = 0.02
    """A trial stops once the 95% interval of the median step time is within plus or minus this share of the median."""

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
    """The time that a trial and its parts may take, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    startup_s: float = 600.0
    """Limit from the start to the end of the first optimizer step, for imports, rendezvous, build and compilation."""
    step_s: float = 300.0
    """Limit between two heartbeats after the first step; a longer silence is a hang."""
    trial_s: float = 1800.0
    """Limit of the whole trial."""

    def __post_init__(self) -> None:
        for name in ("startup_s", "step_s", "trial_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything a program needs to run one trial."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema_version: int = SCHEMA_VERSION
    sweep: OneLine
    """Name of the sweep."""
    number: int
    """The trial's number in its sweep, from 0."""
    attempt: int = 1
    """Which attempt at the trial this is, from 1."""
    workload: Workload
    cluster: Cluster
    layout: Layout
    program: Program = "megatron_core"
    """The program that the trial runs: one of megatune by its name, or one of the user."""
    measurement: Measurement = field(default_factory=Measurement)
    limits: Limits = field(default_factory=Limits)
    seed: int = 1234
    """Seed of the weights, the mock tokens and the dropout."""
    give_up_above_ms: float | None = None
    """The trial may end as too slow once the lower end of its 95% interval, in ms, is above this; None never ends it
    early.
    """

    def __post_init__(self) -> None:
        placement = self.layout.pipeline_model_parallel_layout
        if placement != "none":
            chunks_of_placement(placement)  # raises ValueError if it cannot be read: nothing could run or predict it


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The exception of a failing rank, as the rank saw it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: str
    """The exception's qualified name, as `torch.OutOfMemoryError`; builtins without their module."""
    message: str
    traceback: str
    time_s: float
    """When the exception was raised, in seconds since the epoch; the earliest of several failures is the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRecord:
    """The report that one rank writes at its end or at its failure."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: int
    """The rank's number in the job, from 0."""
    host: OneLine
    """Name of the rank's machine."""
    phase: Phase
    """The phase in which the rank ended."""
    step: int
    """Number of finished optimizer steps, warm-up included."""
    peak_allocated_gib: float | None = None
    """Largest memory allocated by the rank, GiB; None if it was not measured."""
    peak_reserved_gib: float | None = None
    """Largest memory reserved by the rank's allocator, GiB; None if it was not measured, as on CPU."""
    failure: Failure | None = None
    """The exception that ended the rank; None if none did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """A sign of life that rank 0 writes when a phase begins and after every step; if none comes, the trial hangs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phase: Phase
    step: int
    """Number of finished optimizer steps, warm-up included."""
    time_s: float
    """When the heartbeat was written, in seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """The wall clock of a trial and of its parts, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    startup_s: float = 0.0
    """Time from the launcher's start until the process group exists."""
    build_s: float = 0.0
    """Time to build the model."""
    warmup_s: float = 0.0
    """Time of the untimed steps."""
    measure_s: float = 0.0
    """Time of the timed steps."""
    total_s: float = 0.0
    """Time from the launcher's start to the end of the last process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """The measurements of a completed trial."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step_times_ms: tuple[float, ...]
    """Duration of every timed step in ms: that of the slowest rank, synchronised."""
    step_time_ms: float
    """Median of `step_times_ms`."""
    step_time_low_ms: float
    """Lower end of the bootstrap 95% interval of the median, in ms."""
    step_time_high_ms: float
    """Upper end of the bootstrap 95% interval of the median, in ms."""
    warmup_times_ms: tuple[float, ...] = ()
    """Duration in ms of every step before the timed ones, including steps that were found to be warm-up afterwards."""
    outliers: tuple[int, ...] = ()
    """Indices into `step_times_ms` of the steps far from the median; the median still includes them."""
    losses: tuple[float, ...]
    """The loss, one per optimizer step, warm-up included."""
    grad_norms: tuple[float, ...]
    """The norm of the gradients, one per optimizer step, warm-up included."""
    tokens_per_s_per_gpu: float
    """Tokens per step / median step time / GPUs."""
    model_tflops_per_s_per_gpu: float
    """Model TFLOP/s per GPU as Megatron counts them, without recompute."""
    mfu: float | None
    """Model FLOP/s as a share of the GPU's dense peak at the precision; None if the cluster states no such peak."""
    peak_allocated_gib: float
    """Largest memory that any rank allocated, GiB."""
    peak_reserved_gib: float | None
    """Largest memory that the allocator of any rank reserved, GiB; None on CPU, where nothing is reserved."""

    def __post_init__(self) -> None:
        for name in ("step_time_ms", "step_time_low_ms", "step_time_high_ms", "peak_allocated_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """The state of the machine while the steps were timed; a value is None if the machine does not report it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples: int
    """Number of samples that the other values come from."""
    power_w: float | None = None
    """Mean power of all the trial's GPUs together, W."""
    energy_j_per_token: float | None = None
    """Energy that all the trial's GPUs used per token, J."""
    clock_mhz: float | None = None
    """Mean clock of the GPUs' SMs, or of the CPU's cores, MHz."""
    lowest_clock_mhz: float | None = None
    """Lowest clock of any GPU's SMs, or of any of the CPU's cores, MHz."""
    temperature_c: float | None = None
    """Highest temperature of any GPU, degrees Celsius."""
    throttle_reasons: tuple[OneLine, ...] = ()
    """NVML's names of the reasons for throttling, without harmless ones (idle, clocks that an application set)."""
    foreign_memory_gib: float | None = None
    """Largest memory that processes outside the trial held on one of its GPUs, GiB."""
    foreign_load: float | None = None
    """Mean number of CPU cores that processes outside the trial kept busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """The end of a trial, with its evidence: the record of truth."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema_version: int = SCHEMA_VERSION
    outcome: Outcome
    reason: OneLine
    """One line: what happened, where, and what to do."""
    phase: Phase | None = None
    """The phase in which the job failed; None if it did not fail."""
    rank: int | None = None
    """The rank that failed first; None if none did."""
    metrics: Metrics | None = None
    """The measurements; present exactly if the outcome is completed."""
    slower_than_ms: float | None = None
    """A lower bound of the step time in ms, if the trial ended before it measured one."""
    telemetry: Telemetry | None = None
    """The state of the machine while the steps were timed; None if nothing was sampled."""
    suspicions: tuple[OneLine, ...] = ()
    """Reasons not to trust the measurement, one line each: the machine was throttled or shared."""
    occupied_gpus: tuple[OneLine, ...] = ()
    """One line per GPU of which others held memory while the trial ran out of it."""
    ranks: tuple[RankRecord, ...] = ()
    """The records of the ranks that left one."""
    durations: Durations = field(default_factory=Durations)
    versions: Mapping[OneLine, OneLine] = field(default_factory=dict)
    """Versions by name: torch, megatron-core, transformer-engine, CUDA, NCCL, driver, python, megatune."""
    device_name: OneLine = ""
    """Name of the GPU or CPU."""
    finished_at: OneLine = ""
    """When the trial ended: ISO 8601, UTC."""

    def __post_init__(self) -> None:
        if (self.outcome is Outcome.COMPLETED) != (self.metrics is not None):
            raise ValueError("metrics are present exactly if the outcome is completed")
        if self.slower_than_ms is not None and (self.metrics is not None or self.slower_than_ms <= 0):
            raise ValueError("slower_than_ms must be above 0, and absent if there are metrics")

    @property
    def is_too_large(self) -> bool:
        """Whether the trial shows that its layout needs more memory than there is.

        A trial that ran out of memory on a GPU of which others held some does not.
        """
        return self.outcome is Outcome.OOM and not self.occupied_gpus


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """The paths of one trial; no other code spells them."""

    path: Path

    @property
    def spec(self) -> Path:
        """The file of the TrialSpec."""
        return self.path / "spec.json"

    @property
    def result(self) -> Path:
        """The file of the TrialResult."""
        return self.path / "result.json"

    @property
    def source(self) -> Path:
        """The file that says why the trial was chosen (tuner.trial.finished.TrialSource)."""
        return self.path / "source.json"

    @property
    def heartbeat(self) -> Path:
        """The file of the last Heartbeat."""
        return self.path / "heartbeat.json"

    @property
    def plan(self) -> Path:
        """The file of the launcher's plan, with the command that started the trial."""
        return self.path / "plan.json"

    @property
    def telemetry(self) -> Path:
        """The file of what the launcher saw of the machine, one sample per line."""
        return self.path / "telemetry.jsonl"

    @property
    def log(self) -> Path:
        """The folder of what the ranks print."""
        return self.path / "log"

    @property
    def ranks(self) -> Path:
        """The folder of the RankRecords."""
        return self.path / "ranks"

    def rank_record(self, rank: int) -> Path:
        """The file of a rank's RankRecord."""
        return self.ranks / f"rank{rank:05d}.json"

    def set_aside(self, attempt: int) -> Path:
        """The folder that keeps the files of an earlier attempt; attempts count from 1."""
        return self.path / f"attempt-{attempt}"
