"""Writes the result of a trial whose ranks all reached its end, with what the timed steps show."""

import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from launchers.programs.harness.measure import median_interval, outliers, warmup_end
from launchers.programs.harness.monitor import Monitor
from tuner.core.flops import model_flops_per_token
from tuner.files import write_json
from tuner.trial.contract import Failure, Metrics, Outcome, RankRecord, TrialResult, TrialSpec

PeakGib = tuple[float | None, float | None]
"""A rank's peak of allocated and of reserved memory in GiB; None if it is not known."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a completed trial, warm-up included; each field has one value per step."""

    times_ms: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


def rank_record(monitor: Monitor, peak: PeakGib = (None, None), failure: Failure | None = None) -> RankRecord:
    """Return the record of this rank: where it runs, how far it got, its peak memory, and its failure, if any."""
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
    """Write the result of a trial that ran to its end; call it on rank 0 only."""
    metrics = metrics_of(spec, steps, records)
    reason = f"{metrics.step_time_ms:.1f} ms a step over {len(metrics.step_times_ms)} timed steps"
    write_result(monitor, TrialResult(outcome=Outcome.COMPLETED, reason=reason, metrics=metrics), records)


def write_too_slow(
    spec: TrialSpec, monitor: Monitor, slower_than_ms: float, records: Sequence[RankRecord]
) -> None:
    """Write the result of a trial that was given up because it is too slow; call it on rank 0 only.

    `slower_than_ms` is a lower bound of the trial's step time in ms, which exceeds `spec.give_up_above_ms`.
    """
    timed = monitor.step - spec.measurement.warmup_steps
    reason = (
        f"slower than {slower_than_ms:.1f} ms a step, as {timed} timed steps say; "
        f"given up above {spec.give_up_above_ms:.1f} ms"
    )
    result = TrialResult(
        outcome=Outcome.TOO_SLOW, reason=reason, phase="measure", slower_than_ms=slower_than_ms
    )
    write_result(monitor, result, records)


def write_result(monitor: Monitor, result: TrialResult, records: Sequence[RankRecord]) -> None:
    """Write a result, after adding the records of the ranks and the durations and versions that every result has."""
    result = replace(
        result,
        ranks=tuple(records),
        durations=monitor.durations(),
        versions=versions(),
        device_name=device_name(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(monitor.folder.result, result)


def metrics_of(spec: TrialSpec, steps: Steps, records: Sequence[RankRecord]) -> Metrics:
    """Return the metrics of a completed trial, from its steps and the peak memory of its ranks."""
    workload, gpu = spec.workload, spec.cluster.gpu
    least, tolerance = spec.measurement.warmup_steps, spec.measurement.target_relative_interval
    first = least + warmup_end(steps.times_ms[least:], tolerance)
    timed_ms = steps.times_ms[first:]
    median, low, high = median_interval(timed_ms)
    tokens_per_s = workload.tokens_per_step / (median / 1000) / spec.cluster.world_size
    tflops = tokens_per_s * model_flops_per_token(workload) / 1e12
    peak_tflops = gpu.peak_tflops.get(workload.precision)
    reserved_gib = [record.peak_reserved_gib for record in records if record.peak_reserved_gib is not None]
    return Metrics(
        step_times_ms=timed_ms,
        step_time_ms=median,
        step_time_low_ms=low,
        step_time_high_ms=high,
        warmup_times_ms=steps.times_ms[:first],
        outliers=outliers(timed_ms, tolerance),
        losses=steps.losses,
        grad_norms=steps.grad_norms,
        tokens_per_s_per_gpu=tokens_per_s,
        model_tflops_per_s_per_gpu=tflops,
        mfu=tflops / peak_tflops if peak_tflops else None,
        peak_allocated_gib=max(record.peak_allocated_gib or 0.0 for record in records),
        peak_reserved_gib=max(reserved_gib, default=None),
    )


def versions() -> dict[str, str]:
    """Return the versions of what a measurement depends on, by name; a package that is not installed is left out."""
    by_name = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "megatron-bridge", "transformer-engine", "megatune"):
        try:
            by_name[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        from pynvml import nvmlInit, nvmlSystemGetDriverVersion

        nvmlInit()
        by_name["driver"] = str(nvmlSystemGetDriverVersion())
        by_name["cuda"] = str(torch.version.cuda)
        by_name["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return by_name


def device_name() -> str:
    """Return the name of this rank's device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
