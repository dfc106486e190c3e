"""The contract of a trial: the files through which the tuner, a launcher and a program exchange data.

A launcher writes `spec.json`. The program reads it, writes `heartbeat.json` while it runs, and at its end one record
per rank and `result.json`, also after an error. So a program needs to import only this module and the nouns of
`tuner.core`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
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
"""The version of the format of `spec.json` and `result.json`."""


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
"""The part of a trial that a rank has reached.

`startup` imports modules and joins the process group, `build` builds the model, `warmup` runs untimed steps, `memory`
runs one step with a record of its memory, `measure` runs timed steps, `teardown` is the end. After a failure within a
step, the phase may be the part of that step instead: `forward`, `backward` or `optimizer`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """How many optimizer steps a trial runs, and how many of them it times."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    warmup_steps: int = 3
    """The number of first optimizer steps, which are never timed. It is at least 3, since the first step creates Adam's
    state, and so only the second has the peak memory. If step times still fall after these steps, further steps are
    treated as warm-up.
    """
    min_steps: int = 5
    """The smallest number of timed steps, after all warm-up."""
    max_steps: int = 20
    """The largest number of steps after `warmup_steps`. If further steps are treated as warm-up, the limit is at least
    twice `min_steps`.
    """
    target_relative_interval: float = 0.02
    """A trial stops once the 95% interval of the median step time lies within this share of the median on both sides.
    """

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
    """The time limits of a trial and of its parts, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    startup_s: float = 600.0
    """The limit from the start to the end of the first optimizer step: for imports, rendezvous, build and compilation.
    """
    step_s: float = 300.0
    """The limit between two heartbeats after the first step; a longer silence is a hang."""
    trial_s: float = 1800.0
    """The limit of the whole trial."""

    def __post_init__(self) -> None:
        for name in ("startup_s", "step_s", "trial_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything that a program needs to know to run one trial."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema_version: int = SCHEMA_VERSION
    sweep: OneLine
    """The name of the sweep."""
    number: int
    """The trial's number in its sweep, from 0."""
    attempt: int = 1
    """The number of the attempt at this trial, from 1."""
    workload: Workload
    cluster: Cluster
    layout: Layout
    program: Program = "megatron_core"
    """The program that the trial runs: the name of one of megatune's programs, or a program of the user."""
    measurement: Measurement = field(default_factory=Measurement)
    limits: Limits = field(default_factory=Limits)
    seed: int = 1234
    """The random seed of the weights, the mock tokens and the dropout."""
    give_up_above_ms: float | None = None
    """A step time in ms. The trial may end early, as too slow, once the lower end of the 95% interval of its median
    step time is above this value. None never ends the trial early.
    """

    def __post_init__(self) -> None:
        placement = self.layout.pipeline_model_parallel_layout
        if placement != "none":
            chunks_of_placement(placement)  # raises ValueError if the placement cannot be parsed


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The exception that ended a rank, as the rank recorded it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: str
    """The qualified name of the exception's class, such as `torch.OutOfMemoryError`; for a builtin, its name only."""
    message: str
    traceback: str
    time_s: float
    """When the exception was raised, in seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRecord:
    """The record that one rank writes when it ends or fails."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: int
    """The rank's number in the job, from 0."""
    host: OneLine
    """The host name of the rank's machine."""
    phase: Phase
    """The phase in which the rank ended."""
    step: int
    """The number of finished optimizer steps, warm-up included."""
    peak_allocated_gib: float | None = None
    """The most memory that the rank allocated, in GiB; None if it was not measured."""
    peak_reserved_gib: float | None = None
    """The most memory that the rank's CUDA allocator reserved, in GiB; None if it was not measured, as on CPU."""
    failure: Failure | None = None
    """The exception that ended the rank; None if no exception did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What rank 0 writes when a phase begins and after every step, to show that the trial does not hang."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phase: Phase
    step: int
    """The number of finished optimizer steps, warm-up included."""
    time_s: float
    """When the heartbeat was written, in seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """The wall-clock time that a trial and its parts took, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    startup_s: float = 0.0
    """The time from the launch until the process group exists."""
    build_s: float = 0.0
    """The time to build the model."""
    warmup_s: float = 0.0
    """The time of the untimed steps."""
    measure_s: float = 0.0
    """The time of the timed steps."""
    total_s: float = 0.0
    """The time from the launch to the end of the last process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """The measurements of a completed trial."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step_times_ms: tuple[float, ...]
    """The time of each timed step on the slowest rank, in ms; the device is synchronised at both ends of a step."""
    step_time_ms: float
    """The median of `step_times_ms`."""
    step_time_low_ms: float
    """The lower end of the bootstrap 95% interval of the median, in ms."""
    step_time_high_ms: float
    """The upper end of the bootstrap 95% interval of the median, in ms."""
    warmup_times_ms: tuple[float, ...] = ()
    """The time of each step before the timed ones, in ms, including steps that were only later treated as warm-up."""
    outliers: tuple[int, ...] = ()
    """Indices into `step_times_ms` of the steps far from the median; the median still includes them."""
    losses: tuple[float, ...]
    """The loss of each optimizer step, warm-up included."""
    grad_norms: tuple[float, ...]
    """The norm of the gradients of each optimizer step, warm-up included."""
    tokens_per_s_per_gpu: float
    """Tokens per step / median step time in s / number of GPUs."""
    model_tflops_per_s_per_gpu: float
    """Model TFLOP/s per GPU as Megatron counts them, without recomputation."""
    mfu: float | None
    """Model FLOP/s as a share of the GPU's dense peak in the workload's precision; None if the cluster states no such
    peak."""
    peak_allocated_gib: float
    """The most memory that any rank allocated, in GiB."""
    peak_reserved_gib: float | None
    """The most memory that the CUDA allocator of any rank reserved, in GiB; None on CPU, where nothing is reserved."""

    def __post_init__(self) -> None:
        for name in ("step_time_ms", "step_time_low_ms", "step_time_high_ms", "peak_allocated_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """The state of the machine during the timed steps; a value is None if the machine does not report it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples: int
    """The number of samples from which the other values are computed."""
    power_w: float | None = None
    """The mean power of all the trial's GPUs together, in W."""
    energy_j_per_token: float | None = None
    """The energy that all the trial's GPUs used per token, in J."""
    clock_mhz: float | None = None
    """The mean clock of the GPUs' SMs, or of the CPU's cores, in MHz."""
    lowest_clock_mhz: float | None = None
    """The lowest clock of any GPU's SMs, or of any of the CPU's cores, in MHz."""
    temperature_c: float | None = None
    """The highest temperature of any GPU, in degrees Celsius."""
    throttle_reasons: tuple[OneLine, ...] = ()
    """NVML's names of the reasons for throttling, without harmless ones (idle, clocks that an application set)."""
    foreign_memory_gib: float | None = None
    """The most memory that processes outside the trial held on one of its GPUs, in GiB."""
    foreign_load: float | None = None
    """The mean number of CPU cores that processes outside the trial kept busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """How a trial ended and what it measured; views are rebuilt from this record."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema_version: int = SCHEMA_VERSION
    outcome: Outcome
    reason: OneLine
    """One line: what happened, where, and what to do."""
    phase: Phase | None = None
    """The phase in which the job failed; None if it did not fail."""
    rank: int | None = None
    """The rank that failed first; None if no rank did."""
    metrics: Metrics | None = None
    """The measurements; not None exactly if the outcome is completed."""
    slower_than_ms: float | None = None
    """A lower bound of the step time in ms, if the trial ended before it measured its step time; otherwise None."""
    telemetry: Telemetry | None = None
    """The state of the machine during the timed steps; None if nothing was sampled."""
    suspicions: tuple[OneLine, ...] = ()
    """Reasons not to trust the measurement, one line each: the machine was throttled or shared."""
    occupied_gpus: tuple[OneLine, ...] = ()
    """If the trial ran out of memory: one line of text for each of its GPUs on which other processes held memory."""
    ranks: tuple[RankRecord, ...] = ()
    """The records of those ranks that wrote one."""
    durations: Durations = field(default_factory=Durations)
    versions: Mapping[OneLine, OneLine] = field(default_factory=dict)
    """The versions of torch, megatron-core, transformer-engine, CUDA, NCCL, driver, python and megatune, by name."""
    device_name: OneLine = ""
    """The model name of the GPU or CPU."""
    finished_at: OneLine = ""
    """The time when the trial ended, in ISO 8601 and UTC."""

    def __post_init__(self) -> None:
        if (self.outcome is Outcome.COMPLETED) != (self.metrics is not None):
            raise ValueError("metrics are present exactly if the outcome is completed")
        if self.slower_than_ms is not None and (self.metrics is not None or self.slower_than_ms <= 0):
            raise ValueError("slower_than_ms must be above 0, and absent if there are metrics")
        if self.finished_at:
            try:
                datetime.fromisoformat(self.finished_at).timestamp()
            except (ValueError, OverflowError):
                raise ValueError(f"finished_at is no time in ISO 8601: {self.finished_at}") from None

    @property
    def is_too_large(self) -> bool:
        """Whether the trial shows that its layout needs more memory than the GPUs have.

        It does not if it ran out of memory while other processes held memory on one of its GPUs.
        """
        return self.outcome is Outcome.OOM and not self.occupied_gpus


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """The paths of the files of one trial; only this class spells their names."""

    path: Path

    @property
    def spec(self) -> Path:
        """The path of the TrialSpec."""
        return self.path / "spec.json"

    @property
    def result(self) -> Path:
        """The path of the TrialResult."""
        return self.path / "result.json"

    @property
    def source(self) -> Path:
        """The path of the file that says why the trial was chosen (`tuner.trial.finished.TrialSource`)."""
        return self.path / "source.json"

    @property
    def heartbeat(self) -> Path:
        """The path of the last Heartbeat."""
        return self.path / "heartbeat.json"

    @property
    def plan(self) -> Path:
        """The path of the launcher's plan, with the command that started the trial."""
        return self.path / "plan.json"

    @property
    def telemetry(self) -> Path:
        """The path of the machine's telemetry, which the launcher samples: one JSON object per line and sample."""
        return self.path / "telemetry.jsonl"

    @property
    def log(self) -> Path:
        """The path of the folder for the output of the launcher and the ranks."""
        return self.path / "log"

    @property
    def ranks(self) -> Path:
        """The path of the folder for the RankRecords."""
        return self.path / "ranks"

    def rank_record(self, rank: int) -> Path:
        """Return the path of a rank's RankRecord."""
        return self.ranks / f"rank{rank:05d}.json"

    def set_aside(self, attempt: int) -> Path:
        """Return the path of the folder for the files of an earlier attempt; attempts are numbered from 1."""
        return self.path / f"attempt-{attempt}"
