"""What a trial's program writes: heartbeats while it runs, a record of each failing rank, and the result."""

import json
import platform
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from launchers.programs.harness.measure import median_interval, outliers, warmup_end
from tuner.core.flops import model_flops_per_token
from tuner.errors import InputError
from tuner.files import read_json, to_data, write_json
from tuner.trial.contract import (
    Durations,
    Failure,
    Heartbeat,
    Metrics,
    Outcome,
    Phase,
    RankRecord,
    TrialFolder,
    TrialResult,
    TrialSpec,
)
from tuner.trial.outcomes import cause_of, outcome_of_failure

_CAUSE_S = 1.0
"""Ten times what torchrun takes to see that a rank has ended."""


class NonFiniteLossError(Exception):
    """The loss or the norm of the gradients is NaN or infinite."""


class Monitor:
    """Where this rank is, and the clock of the trial. Rank 0 shows it in the heartbeat file."""

    def __init__(self, folder: TrialFolder, rank: int, started_at: float) -> None:
        """`started_at`: when the launcher started the trial, in seconds since the epoch."""
        self.folder, self.rank, self.started_at = folder, rank, started_at
        self.phase: Phase = "startup"
        self.step = 0
        self._entered = started_at
        self._spent: dict[Phase, float] = {}
        self._beat()

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the trial."""
        now = time.time()
        self._close(now)
        self._outer, self._entered = phase, now
        self.phase = phase
        self._beat()

    def enter_part(self, phase: Phase) -> None:
        """Begin a part of a step; too frequent for a heartbeat."""
        self.phase = phase

    def finish_step(self) -> None:
        """Count an optimizer step."""
        self.step += 1
        self.phase = self._outer
        self._beat()

    def durations(self) -> Durations:
        """Return where the time went, up to now."""
        now = time.time()
        self._close(now)
        self._entered = now
        spent = self._spent
        return Durations(
            startup_s=spent.get("startup", 0.0),
            build_s=spent.get("build", 0.0),
            warmup_s=spent.get("warmup", 0.0) + spent.get("memory", 0.0),
            measure_s=spent.get("measure", 0.0),
            total_s=now - self.started_at,
        )

    _outer: Phase = "startup"

    def _close(self, now: float) -> None:
        self._spent[self._outer] = self._spent.get(self._outer, 0.0) + now - self._entered

    def _beat(self) -> None:
        if self.rank:
            return
        path = self.folder.heartbeat
        temporary = path.with_name(".heartbeat.tmp")
        data = to_data(Heartbeat(phase=self.phase, step=self.step, time_s=time.time()))
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(path)  # no sync: a heartbeat lost with the machine is no loss


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps of a completed trial gave, one value a step, warm-up included."""

    times_ms: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


def rank_record(
    monitor: Monitor, peak: tuple[float | None, float | None] = (None, None), failure: Failure | None = None
) -> RankRecord:
    """Return what this rank reports; `peak` is allocated and reserved, in GiB."""
    return RankRecord(
        rank=monitor.rank,
        host=socket.gethostname(),
        phase=monitor.phase,
        step=monitor.step,
        peak_allocated_gib=peak[0],
        peak_reserved_gib=peak[1],
        failure=failure,
    )


def write_completed(spec: TrialSpec, monitor: Monitor, steps: Steps, records: Sequence[RankRecord]) -> None:
    """Write the result of a trial that ran to its end; rank 0 only."""
    metrics = metrics_of(spec, steps, records)
    reason = f"{metrics.step_time_ms:.1f} ms a step over {len(metrics.step_times_ms)} timed steps"
    result = TrialResult(outcome=Outcome.COMPLETED, reason=reason, metrics=metrics)
    _write(monitor, result, records)


def write_too_slow(
    spec: TrialSpec, monitor: Monitor, slower_than_ms: float, records: Sequence[RankRecord]
) -> None:
    """Write the result of a trial that cannot be as fast as asked for; rank 0 only."""
    timed = monitor.step - spec.measurement.warmup_steps
    reason = (
        f"slower than {slower_than_ms:.1f} ms a step, as {timed} timed steps say; "
        f"given up above {spec.give_up_above_ms:.1f} ms"
    )
    result = TrialResult(
        outcome=Outcome.TOO_SLOW, reason=reason, phase="measure", slower_than_ms=slower_than_ms
    )
    _write(monitor, result, records)


def _write(monitor: Monitor, result: TrialResult, records: Sequence[RankRecord]) -> None:
    """Write a result with what every one tells beside its outcome."""
    result = replace(
        result,
        ranks=tuple(records),
        durations=monitor.durations(),
        versions=versions(),
        device_name=device_name(),
        finished_at=_now(),
    )
    write_json(monitor.folder.result, result)


def report_failure(
    monitor: Monitor, error: Exception, peak: tuple[float | None, float | None] = (None, None)
) -> None:
    """Say in every place how this rank failed: in its output, its record, and the trial's result.

    A full disk refuses them all, and must not keep the rank from its end. A rank that lost a connection waits a
    moment, so that the launcher sees the peer end first whose end may be the cause.
    """
    with suppress(OSError):
        traceback.print_exception(error)
    with suppress(OSError):
        write_failed(monitor, error, peak)
    outcome, _ = outcome_of_failure(_qualified_name(type(error)), str(error), monitor.phase, monitor.step)
    if outcome is Outcome.COMMUNICATION:
        time.sleep(_CAUSE_S)


def write_failed(
    monitor: Monitor, error: BaseException, peak: tuple[float | None, float | None] = (None, None)
) -> None:
    """Write this rank's record of its failure, and the trial's result if no other rank has."""
    path = monitor.folder.rank_record(monitor.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rank_record(monitor, peak, failure_of(error)))
    if monitor.folder.result.exists():
        return
    records = _written_records(monitor.folder)
    cause = cause_of(records)
    if cause is None or cause.failure is None:
        return
    outcome, reason = outcome_of_failure(cause.failure.kind, cause.failure.message, cause.phase, cause.step)
    result = TrialResult(outcome=outcome, reason=reason, phase=cause.phase, rank=cause.rank)
    _write(monitor, result, records)


def failure_of(error: BaseException) -> Failure:
    """Return what a rank says of the error that ended it."""
    return Failure(
        kind=_qualified_name(type(error)),
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        time_s=time.time(),
    )


def metrics_of(spec: TrialSpec, steps: Steps, records: Sequence[RankRecord]) -> Metrics:
    """Return what the timed steps and the ranks' peaks amount to."""
    workload, gpu = spec.workload, spec.cluster.gpu
    least, tolerance = spec.measurement.warmup_steps, spec.measurement.target_relative_interval
    first = least + warmup_end(steps.times_ms[least:], tolerance)
    timed_ms = steps.times_ms[first:]
    median, low, high = median_interval(timed_ms)
    tokens = workload.tokens_per_step / (median / 1000) / spec.cluster.world_size
    tflops = tokens * model_flops_per_token(workload) / 1e12
    peak_tflops = gpu.peak_tflops.get(workload.precision)
    reserved = [record.peak_reserved_gib for record in records if record.peak_reserved_gib is not None]
    return Metrics(
        step_times_ms=timed_ms,
        step_time_ms=median,
        step_time_low_ms=low,
        step_time_high_ms=high,
        warmup_times_ms=steps.times_ms[:first],
        outliers=outliers(timed_ms, tolerance),
        losses=steps.losses,
        grad_norms=steps.grad_norms,
        tokens_per_s_per_gpu=tokens,
        model_tflops_per_s_per_gpu=tflops,
        mfu=tflops / peak_tflops if peak_tflops else None,
        peak_allocated_gib=max(record.peak_allocated_gib or 0.0 for record in records),
        peak_reserved_gib=max(reserved, default=None),
    )


def versions() -> dict[str, str]:
    """Return the versions that a measurement depends on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "megatron-bridge", "transformer-engine", "megatune"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        from pynvml import nvmlInit, nvmlSystemGetDriverVersion

        nvmlInit()
        found["driver"] = str(nvmlSystemGetDriverVersion())
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def device_name() -> str:
    """Return the name of this rank's device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _written_records(folder: TrialFolder) -> tuple[RankRecord, ...]:
    records = []
    for path in sorted(folder.rank_record(0).parent.glob("rank*.json")):
        try:
            records.append(read_json(RankRecord, path))
        except InputError:  # another rank's, just being replaced
            continue
    return tuple(records)


def _qualified_name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
