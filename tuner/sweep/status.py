"""What a running sweep does now: `status.json`, written anew at every event for other processes."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT, read_json, write_json
from tuner.printable import OneLine
from tuner.search.stopping import Certainty
from tuner.sweep.folder import SweepFolder
from tuner.sweep.progress import Progress, SearchPart
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.state import RunningTrial
from tuner.trial.contract import Heartbeat, Phase
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    import pandas as pd

_HEARTBEAT_S: Final = 1.0
"""Least time between two writes for heartbeats alone, in seconds: steps may take milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningStatus:
    """A trial in flight."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    number: int
    label: OneLine
    """The label of the layout."""
    source: OneLine
    attempt: int
    began_at: OneLine
    """When the attempt began: ISO 8601, UTC."""
    phase: Phase = "startup"
    step: int = 0
    """Number of optimizer steps finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestStatus:
    """The fastest layout measured so far."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    number: int
    label: OneLine
    step_time_ms: float
    tokens_per_s_per_gpu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CertaintyStatus:
    """How near the best measured row is to the best of all rows."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    within: float
    """The share of the step time that `probability` refers to."""
    probability: float
    """The probability that no row left is faster by more than `within`."""
    of: OneLine
    """The set that all rows make up, as in `Certainty.searched`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A sweep as it stands while a tuner runs it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    updated_at: OneLine
    """When the file was written: ISO 8601, UTC."""
    halt: OneLine
    """Whether the sweep runs, is paused or stops: a value of `Halt`."""
    running: tuple[RunningStatus, ...]
    finished: int
    """Number of finished trials."""
    budget: int
    """Number of trials that the sweep may take."""
    used_s: float
    """Wall clock in seconds of all trials so far."""
    used_gpu_hours: float
    left_s: float | None
    """Seconds until the first time limit of the budget; None if there is no time limit."""
    deadline_at: OneLine | None
    """When the sweep is to end: ISO 8601, UTC; None without a deadline."""
    best: BestStatus | None
    certainty: CertaintyStatus | None
    part: SearchPart | None
    """The part of the search that is under way; None if the sweep has one part only."""
    request_taken: str | None = None
    """The id of the last request that the tuner took."""
    ended: OneLine | None = None
    """Why the sweep ended, in words; None while a tuner runs it, or if that tuner was killed."""


def read_status(folder: SweepFolder) -> Status | None:
    """The status in a results folder; None if there is none that this version can read, since it is only a view."""
    try:
        return read_json(Status, folder.status)
    except InputError:
        return None


class StatusFile(Sink):
    """Keeps `status.json` of a results folder current.

    Args:
        folder: The results folder.
        world_size: GPUs that a trial takes.
        near: The share of the step time within which certainty is told.
        deadline_s: When the sweep is to end, in seconds since the epoch; None without a deadline.
        clock_s: Returns the time, in seconds since the epoch.
    """

    def __init__(
        self,
        folder: SweepFolder,
        *,
        world_size: int,
        near: float,
        deadline_s: float | None = None,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._world_size, self._near = folder, world_size, near
        self._deadline_s, self._clock_s = deadline_s, clock_s
        self._status: Status | None = None
        self._written_s = 0.0

    def opened(self, snapshot: Snapshot, table: "pd.DataFrame") -> None:
        """See Sink."""
        self._write(self._of(snapshot))

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        """See Sink."""
        self._write(self._of(snapshot))

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """See Sink."""
        if self._status is None:
            return
        running = tuple(
            replace(trial, phase=heartbeat.phase, step=heartbeat.step) if trial.number == number else trial
            for trial in self._status.running
        )
        self._status = replace(self._status, running=running)
        if self._clock_s() - self._written_s >= _HEARTBEAT_S:
            self._write(self._status)

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """See Sink."""
        self._write(self._of(snapshot))

    def halted(self, snapshot: Snapshot, request: str) -> None:
        """See Sink."""
        self._write(replace(self._of(snapshot), request_taken=request))

    def closed(self, reason: str) -> None:
        """See Sink."""
        if self._status is not None:
            self._write(replace(self._status, running=(), ended=reason))

    def _of(self, snapshot: Snapshot) -> Status:
        state, progress = snapshot.state, snapshot.progress
        earlier = {trial.number: trial for trial in self._status.running} if self._status else {}
        return Status(
            updated_at="",
            halt=state.halt.value,
            running=tuple(self._running(trial, earlier.get(trial.number)) for trial in state.running),
            finished=progress.finished,
            budget=progress.budget,
            used_s=progress.used_s,
            used_gpu_hours=progress.used_s * self._world_size / 3600,
            left_s=progress.left_s,
            deadline_at=None if self._deadline_s is None else _iso(self._deadline_s),
            best=_best(progress),
            certainty=_certainty(progress.certainty, self._near),
            part=progress.part,
            request_taken=self._status.request_taken if self._status else None,
        )

    def _running(self, trial: RunningTrial, earlier: RunningStatus | None) -> RunningStatus:
        if earlier is not None and earlier.attempt == trial.attempt:
            return earlier
        return RunningStatus(
            number=trial.number,
            label=trial.layout.label(),
            source=trial.source.source,
            attempt=trial.attempt,
            began_at=_iso(self._clock_s()),
        )

    def _write(self, status: Status) -> None:
        self._status, self._written_s = status, self._clock_s()
        # The sweep is the work: a status that cannot be written does not end it.
        with suppress(OSError):
            write_json(self._folder.status, replace(status, updated_at=_iso(self._written_s)))


def _best(progress: Progress) -> BestStatus | None:
    trial = progress.best
    if trial is None or trial.result.metrics is None:
        return None
    return BestStatus(
        number=trial.number,
        label=trial.layout.label(),
        step_time_ms=trial.result.metrics.step_time_ms,
        tokens_per_s_per_gpu=trial.result.metrics.tokens_per_s_per_gpu,
    )


def _certainty(certainty: Certainty | None, near: float) -> CertaintyStatus | None:
    if certainty is None:
        return None
    return CertaintyStatus(within=near, probability=certainty.within(near), of=certainty.searched)


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")
