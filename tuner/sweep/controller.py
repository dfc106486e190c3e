"""The loop of a sweep: asks the policy, has the runner act, and keeps state, searcher and sinks in step."""

import errno
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event as Flag
from typing import Final, Protocol, assert_never

import pandas as pd

from tuner.files import make_folder, write_json
from tuner.predict.calibration import Calibration
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import SweepFolder
from tuner.sweep.policy import Finish, Launch, Policy, Queued, Refine, Wait
from tuner.sweep.progress import Progress, progress_of
from tuner.sweep.requests import take_request
from tuner.sweep.reserve import make_room
from tuner.sweep.restore import restored
from tuner.sweep.runner import AttemptEnded, Beat, Runner
from tuner.sweep.searcher import Search, Searcher
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.specs import finished_trial, trial_spec
from tuner.sweep.state import (
    AttemptFailed,
    BeginFailed,
    Halt,
    HaltAsked,
    RefinementBegan,
    RunningTrial,
    SweepState,
    TimeRanOut,
    TrialBegan,
    TrialEnded,
    advanced,
    is_over,
)
from tuner.trial.finished import FinishedTrial

_POLL_S: Final = 0.2
"""Seconds between two checks for a signal or a request."""

RETRY_S: Final = 10.0
"""Seconds from a failure of the machine to the next attempt. Assumed: a disk that fills up for a moment, or a GPU that
is given back late, has recovered by then."""


_log = logging.getLogger(__name__)


class Clock(Protocol):
    """Tells the time; Python's `time` module is one."""

    def time(self) -> float:
        """Seconds since the epoch."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""


@dataclass(kw_only=True, slots=True, eq=False)
class Controller:
    """Runs a sweep to its end. It decides nothing itself, and the trial folders are the only record it relies on.

    Attributes:
        stop: Set from outside, by a signal: the running trials are ended and run again on resume.
        state: The state of the sweep; at first the state that its folder holds (`restored`).
        check_claim: Raises OSError if the results folder is no longer the one that this tuner has claimed.
    """

    sweep: Sweep
    search: Search
    policy: Policy
    folder: SweepFolder
    runner: Runner
    state: SweepState
    stop: Flag
    sinks: Sequence[Sink] = ()
    clock: Clock = time
    check_claim: Callable[[], None] = lambda: None
    searcher: Searcher = field(init=False)
    _own_s: float = field(default=0.0, init=False)
    """Seconds without a trial in flight, between the first trial of this run and the last."""
    _first_s: float = field(default=0.0, init=False)
    _last_s: float = field(default=0.0, init=False)
    _unwritten: list[FinishedTrial] = field(default_factory=list, init=False)
    """Finished trials whose result could not be written, as on a full disk."""

    def __post_init__(self) -> None:
        self.searcher = self.search.searcher(self.state)

    def run(self) -> Stop:
        """Run trials until the policy finishes the sweep; return the reason."""
        self._open()
        while True:
            self._take_halt()
            now_s = self.clock.time()
            if not self.state.is_out_of_time and self.policy.is_out_of_time(self.state, now_s):
                self.state = advanced(self.state, TimeRanOut())
            action = self.policy.next_action(self.state, self.searcher, self.runner.free_slots, now_s)
            match action:
                case Launch():
                    self._launch(action)
                case Refine(centres):
                    self.state = advanced(self.state, RefinementBegan(centres))
                    self.searcher = self.search.searcher(self.state)
                    self._open()
                case Wait():
                    self._wait()
                case Finish(reason):
                    self._close(reason)
                    return reason
                case _:
                    assert_never(action)

    def progress(self) -> Progress:
        """How far the sweep is."""
        return progress_of(
            self.state,
            self.policy,
            self.searcher,
            now_s=self.clock.time(),
            own_s=self._own_s,
            run_s=self._last_s - self._first_s,
        )

    def finals_note(self) -> str | None:
        """Return a sentence if the finals are smaller than the sweep asks for, or not complete; None otherwise."""
        return self.policy.finals_note(self.state, self.clock.time())

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.state, self.progress())

    def _open(self) -> None:
        snapshot = self._snapshot()
        for sink in self.sinks:
            sink.opened(snapshot, self.searcher.table)

    def _launch(self, launch: Launch) -> None:
        trial, folder = launch.trial, self.folder.trial(launch.trial.number)
        try:
            self._write_results()
            self._make_folder(trial)
        except OSError as error:
            self._begin_failed(trial, error)
            return
        is_first_in_flight = not self.state.running
        self.state = advanced(self.state, TrialBegan(trial))
        self.searcher.take(trial.number, trial.layout, trial.source.source)
        snapshot = self._snapshot()
        for sink in self.sinks:
            sink.begun(trial, snapshot)
        if is_first_in_flight:
            now_s = self.clock.monotonic()
            self._own_s += now_s - self._last_s if self._last_s else 0.0
            self._first_s = self._first_s or now_s
        spec = trial_spec(self.sweep, trial.number, trial.attempt, trial.layout, launch.give_up_above_ms)
        self.runner.submit(spec, folder)

    def _make_folder(self, trial: RunningTrial) -> None:
        """Make the folder of a trial that begins; raises OSError.

        The folders above it are not made: a results folder that somebody deleted lacks the earlier trials.
        """
        self.check_claim()
        if not self.folder.trials.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder was deleted", str(self.folder.trials))
        folder = self.folder.trial(trial.number)
        make_folder(folder.path)
        write_json(folder.source, trial.source)

    def _write_results(self) -> None:
        """Write the results that the launcher could not write, as on a full disk; raises OSError."""
        while self._unwritten:
            path = self.folder.trial(self._unwritten[0].number).result
            if not path.exists():
                write_json(path, self._unwritten[0].result)
            self._unwritten.pop(0)

    def _begin_failed(self, trial: RunningTrial, error: OSError) -> None:
        reason = f"trial {trial.number} cannot begin in {self.folder.path}: {error}"
        self.state = advanced(self.state, BeginFailed(reason))
        self._after_failure(reason)

    def _after_failure(self, reason: str) -> None:
        """Say how the machine failed; end all trials if it fails too often, else give it time to recover."""
        if self.state.is_broken:
            _log.warning("%s; the sweep stops", reason)
            self.runner.stop_all()
        else:
            _log.warning("%s; tried again in %g s", reason, RETRY_S)
            self.stop.wait(RETRY_S)

    def _close(self, reason: Stop) -> None:
        make_room(self.folder.path)
        try:
            self._write_results()
        except OSError as error:
            numbers = ", ".join(f"t{trial.number:04d}" for trial in self._unwritten)
            _log.warning(
                "the result of %s cannot be written (%s): it is measured again on resume", numbers, error
            )
        for sink in self.sinks:
            sink.closed(reason.value)

    def _wait(self) -> None:
        """Wait until an attempt has ended or somebody has asked for something: nothing else changes the next action."""
        while not self._take_event() and not self._take_halt():
            pass

    def _take_event(self) -> bool:
        """Take in the runner's next event; return whether an attempt ended."""
        event = self.runner.next_event(_POLL_S)
        match event:
            case Beat(number=number, heartbeat=heartbeat):
                for sink in self.sinks:
                    sink.heartbeat(number, heartbeat)
            case AttemptEnded():
                self._last_s = self.clock.monotonic()
                self._ended(event)
        return isinstance(event, AttemptEnded)

    def _ended(self, event: AttemptEnded) -> None:
        trial = self.state.running_trial(event.number)
        if not is_over(event.result, trial.attempt):
            self.state = advanced(self.state, AttemptFailed(event.number, event.result))
            if self.state.halt is Halt.STOPPING:
                self.runner.stop_all()
            elif self.state.failures:
                self._after_failure(f"trial {event.number}: {event.result.reason}")
            return
        finished = finished_trial(self.sweep, trial, event.result)
        self._unwritten.append(finished)
        before, pruned = self.state, self.searcher.pruned
        self.state = advanced(before, TrialEnded(finished))
        self.searcher = self.search.after(self.searcher, before, self.state, finished)
        snapshot = self._snapshot()
        for sink in self.sinks:
            sink.ended(finished, self.searcher.pruned - pruned, snapshot)

    def _take_halt(self) -> bool:
        """Take in what a signal or a request asks for; return whether either asked for anything."""
        is_stopped = self.stop.is_set() and self.state.halt is not Halt.STOPPING
        if is_stopped:
            self.state = advanced(self.state, HaltAsked(Halt.STOPPING))
        request = take_request(self.folder)
        if request is not None:
            self.state = advanced(self.state, HaltAsked(request.halt))
            if self.state.halt is Halt.STOPPING:
                self.runner.stop_all()
            snapshot = self._snapshot()
            for sink in self.sinks:
                sink.halted(snapshot, request.id)
        return is_stopped or request is not None


def resumed(
    sweep: Sweep,
    *,
    table: pd.DataFrame,
    queue: Sequence[Queued],
    folder: SweepFolder,
    runner: Runner,
    stop: Flag,
    sinks: Sequence[Sink] = (),
    calibration: Calibration | None = None,
    deadline_s: float | None = None,
    clock: Clock = time,
    check_claim: Callable[[], None] = lambda: None,
) -> Controller:
    """Return a controller that continues from the state in the results folder, which the caller must have claimed.

    Args:
        sweep: What to measure.
        table: The valid layouts of the grid that may fit, the baseline's row included.
        queue: Layouts to try first, in order.
        folder: The results folder.
        runner: Runs the trials.
        stop: Set to end the running trials and the sweep.
        sinks: The sinks that are told what happens.
        calibration: The machine's calibration, for predicted step times.
        deadline_s: When the last trial should have ended, in seconds since the epoch.
        clock: Tells the time.
        check_claim: Raises OSError if the results folder is no longer the one that the caller has claimed.

    Raises:
        InputError: if a file of the folder cannot be read, or a trial in it is of another sweep.
    """
    problem = sweep.problem
    return Controller(
        sweep=sweep,
        search=Search(problem=problem, grid=table, calibration=calibration),
        policy=Policy(
            problem=problem,
            budget=sweep.budget,
            queue=tuple(queue),
            began_s=clock.time(),
            deadline_s=deadline_s,
        ),
        folder=folder,
        runner=runner,
        state=restored(folder, sweep),
        stop=stop,
        sinks=sinks,
        clock=clock,
        check_claim=check_claim,
    )
