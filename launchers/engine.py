"""Runs a planned job to its end and returns the trial's result: the part that all launchers share.

A launcher makes the plan, and passes a function that starts the job's processes (`Start`). This module prepares the
trial's folder, watches the job, ends it, collects the evidence, and writes the result.
"""

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from launchers.commands import COMMAND
from launchers.processes import MARKER, STARTED_AT, RunningJob, end_marked, inherited_environment
from launchers.watch.classify import Judgement, classify
from launchers.watch.evidence import JobEvidence, as_single_rank, launcher_log, rank_logs, with_files
from launchers.watch.host import HostBefore
from launchers.watch.limits import LimitWatch
from launchers.watch.meters import Sample
from launchers.watch.sampling import Sampler
from launchers.watch.telemetry import summarise, suspicions
from launchers.watch.watcher import JobWatcher
from tuner.core.environment import recorded_environment
from tuner.files import write_json, write_text
from tuner.trial.contract import Heartbeat, Outcome, TrialFolder, TrialResult
from tuner.trial.launcher import LaunchPlan

Start = Callable[[tuple[str, ...], Mapping[str, str], Path, Path], RunningJob]
"""A function that starts a job. It takes the command line, the whole environment, the working directory, and the file
to which stdout and stderr are appended. It raises OSError if the job cannot be started."""

OnHeartbeat = Callable[[Heartbeat], None]

_RESERVE = ".reserve"
"""The name of a file that lies in the trial's folder while the job runs. Its removal makes room for the result if the
disk is full."""
_RESERVE_BYTES = 1 << 18
"""The size of the file _RESERVE in bytes. Assumed: several times the size of a result, its log lines and the ranks'
records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Runs launch plans. Several threads may call `run` at once, each with the plan of another trial."""

    start: Start
    grace_s: float
    """The time between SIGTERM and SIGKILL, in seconds."""
    cores: int
    """The number of CPU cores that the ranks of a trial share."""

    def run(
        self, plan: LaunchPlan, stop: threading.Event, on_heartbeat: OnHeartbeat | None = None
    ) -> TrialResult:
        """Run a planned job to its end, write the trial's result into its folder, and return it.

        The arguments are those of `tuner.trial.launcher.Launcher.run`. A job that cannot be run, as on a full disk, has
        the outcome INFRASTRUCTURE; no OSError is raised.
        """
        folder, started_s = TrialFolder(plan.folder), time.monotonic()
        try:
            evidence, samples = self._watched(plan, folder, stop, on_heartbeat)
            result = judged_result(evidence, classify(evidence), folder)
            result = _with_telemetry(result, samples, plan.world_size, self.cores)
            result = _with_gpus(result, evidence)
        except OSError as error:
            # The disk is full, the folder is gone, or no process can be started: the machine is at fault.
            reason = f"the trial cannot be run in {folder.path}: {error}"
            result = TrialResult(outcome=Outcome.INFRASTRUCTURE, reason=reason)
        durations = replace(result.durations, total_s=time.monotonic() - started_s)
        finished_at = datetime.now(UTC).isoformat(timespec="seconds")
        return _written(replace(result, durations=durations, finished_at=finished_at), folder)

    def _watched(
        self,
        plan: LaunchPlan,
        folder: TrialFolder,
        stop: threading.Event,
        on_heartbeat: OnHeartbeat | None,
    ) -> tuple[JobEvidence, tuple[Sample, ...]]:
        """Run the job to its end; return the evidence of how it ended, and the samples of the machine's telemetry.

        If processes of an earlier attempt cannot be ended, no job is started, and the evidence names these processes.
        """
        if survivors := end_marked(plan.env[MARKER], self.grace_s):
            return JobEvidence(
                limits=plan.limits, folder=folder.path, exit_code=None, survivors=survivors
            ), ()
        _prepare(folder, plan)
        host = HostBefore.of(folder.path, plan.gpus, {**os.environ, **plan.env}.get("CUDA_VISIBLE_DEVICES"))
        watch = LimitWatch(plan.limits, time.monotonic())
        watcher = JobWatcher(folder, watch, on_heartbeat)
        environment = {**inherited_environment(), **plan.env, STARTED_AT: repr(time.time())}
        job = self.start(plan.argv, environment, folder.path, launcher_log(folder))
        sampler = Sampler(folder, host.gpus, plan.limits.trial_s, lambda: watch.phase, host.own_processes)
        try:
            sampler.start()
            ending = watcher.until_end(job, stop)
            ended_at_s = time.time() if ending else math.inf
            silence_s, slower_than_ms = watch.silence_s, watch.slower_than_ms(time.monotonic())
        finally:
            samples = sampler.end()
            survivors = job.end(self.grace_s)
            free_bytes = shutil.disk_usage(folder.path).free
            (folder.path / _RESERVE).unlink(missing_ok=True)
            watcher.close_gaps()
        gpus = host.gpus_after()
        evidence = JobEvidence(
            limits=plan.limits,
            folder=folder.path,
            exit_code=job.exit_code,
            ending=ending,
            ended_at_s=ended_at_s,
            silence_s=silence_s,
            free_bytes=free_bytes,
            survivors=survivors,
            held_gpus=gpus.held,
            unclear_gpus=gpus.unclear,
            occupied_gpus=host.occupied_gpus(gpus, samples),
            heartbeat=watch.heartbeat,
            slower_than_ms=slower_than_ms,
            host_oom_kills=host.oom_kills_since(),
        )
        evidence = with_files(evidence, folder, plan.world_size)
        return (as_single_rank(evidence) if COMMAND in plan.argv else evidence), samples


def _prepare(folder: TrialFolder, plan: LaunchPlan) -> None:
    """Prepare the trial's folder for the job: move files of an earlier attempt aside, and write the plan's files."""
    set_aside(folder)
    folder.log.mkdir(parents=True)
    for name, text in plan.files.items():
        write_text(folder.path / name, text)
    inherited = recorded_environment(inherited_environment())
    write_json(folder.plan, {**plan.to_data(), "inherited": inherited})
    (folder.path / _RESERVE).write_bytes(os.urandom(_RESERVE_BYTES))


def set_aside(folder: TrialFolder) -> None:
    """Move the files of an earlier attempt, if there are any, from the trial's folder into a subfolder of it.

    `result.json` is moved first, since the trial counts as finished while that file is in the trial's folder.
    """
    attempt_paths = (
        folder.result,
        folder.heartbeat,
        folder.ranks,
        folder.log,
        folder.plan,
        folder.telemetry,
    )
    stale = [path for path in attempt_paths if path.exists()]
    if not stale:
        return
    attempt = 1
    while folder.set_aside(attempt).exists():
        attempt += 1
    folder.set_aside(attempt).mkdir()
    for path in stale:
        path.rename(folder.set_aside(attempt) / path.name)


def judged_result(evidence: JobEvidence, judgement: Judgement, folder: TrialFolder) -> TrialResult:
    """Return a trial's result.

    It is the result that the program has written, if the program measured something and `judgement` has the same
    outcome. Otherwise it states the outcome and reason of `judgement`, with the ranks' records and no metrics.

    Args:
        evidence: What the job has left, with the program's result.
        judgement: The outcome that `launchers.watch.classify` derives from the evidence.
        folder: The trial's folder; the reason of a failed job names a log file in it.
    """
    reported = evidence.result
    has_measured = judgement.outcome in {Outcome.COMPLETED, Outcome.TOO_SLOW}
    if reported and reported.outcome is judgement.outcome and has_measured:
        return reported
    reason = judgement.reason
    if evidence.exit_code != 0:
        reason += f" (log: {_telling_log(folder, judgement.rank).relative_to(folder.path)})"
    return replace(
        reported or TrialResult(outcome=Outcome.INFRASTRUCTURE, reason=""),
        outcome=judgement.outcome,
        reason=reason,
        phase=judgement.phase,
        rank=judgement.rank,
        metrics=None,
        slower_than_ms=evidence.slower_than_ms if judgement.outcome is Outcome.TIMEOUT else None,
        ranks=evidence.records or (reported.ranks if reported else ()),
    )


def _telling_log(folder: TrialFolder, rank: int | None) -> Path:
    """Return the log file to read first after a failure: the failed rank's stderr.log, or else the launcher's log."""
    paths = [] if rank is None else rank_logs(folder).get(rank, [])
    return next((path for path in paths if path.name == "stderr.log"), launcher_log(folder))


def _with_telemetry(
    result: TrialResult, samples: Sequence[Sample], world_size: int, cores: int
) -> TrialResult:
    """Return the result with the machine's telemetry during the timed steps, and the suspicions that this raises."""
    metrics = result.metrics
    telemetry = summarise(samples, metrics.tokens_per_s_per_gpu * world_size if metrics else None)
    if telemetry is None:
        return result
    return replace(result, telemetry=telemetry, suspicions=suspicions(telemetry, cores))


def _with_gpus(result: TrialResult, evidence: JobEvidence) -> TrialResult:
    """Return the result with what other processes held of the GPUs' memory, if that casts doubt on the result.

    After an OOM, these are the GPUs on which others held memory. Otherwise they become suspicions.
    """
    if result.outcome is Outcome.OOM:
        return replace(result, occupied_gpus=evidence.occupied_gpus)
    unclear = (f"it cannot be seen from here whose memory it is: {line}" for line in evidence.unclear_gpus)
    return replace(result, suspicions=(*result.suspicions, *unclear))


def _written(result: TrialResult, folder: TrialFolder) -> TrialResult:
    """Write the result into the trial's folder and return it.

    If it cannot be written, return the outcome INFRASTRUCTURE instead, unless the trial completed.
    """
    try:
        write_json(folder.result, result)
    except OSError as error:
        if result.outcome is not Outcome.COMPLETED:
            return TrialResult(
                outcome=Outcome.INFRASTRUCTURE,
                reason=f"the result cannot be written in {folder.path}: {error}",
                durations=result.durations,
                finished_at=result.finished_at,
            )
    return result
