"""The state of a sweep as one frozen value, and the new state that each event gives. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from tuner.core.layout import Layout
from tuner.trial.contract import Outcome, TrialResult
from tuner.trial.finished import FinishedTrial, TrialSource

RETRIED: Final = frozenset({Outcome.HANG, Outcome.COMMUNICATION, Outcome.INFRASTRUCTURE})
"""Outcomes that a second attempt may change: the machine is at fault, not the layout."""

RAN: Final = frozenset({Outcome.COMPLETED, Outcome.TOO_SLOW, Outcome.NAN})
"""Outcomes of trials that ran steps, by which the machine is known to work."""

FAILURES_TO_STOP: Final = 3
"""Infrastructure failures in a row that stop the sweep. Unexplained failures count as such until a trial has run."""


_UNEXPLAINED: Final = (
    "megatune does not know this failure, and no trial of the sweep has run yet: the machine, its software or what all "
    "trials share may be at fault"
)


class Halt(Enum):
    """What somebody asked of the running sweep."""

    NONE = "running"
    PAUSED = "paused: running trials end, no further trial starts"
    CLOSING = "stopping once the running trials have ended"
    STOPPING = "stopping now: running trials are ended and run again on resume"


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingTrial:
    """A trial that was begun and has to run again."""

    number: int
    layout: Layout
    source: TrialSource
    attempts_spent: int
    """Attempts so far that count against the trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningTrial:
    """A trial in flight."""

    number: int
    layout: Layout
    source: TrialSource
    attempt: int
    """The number of the attempt, from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepState:
    """Everything that the decision what runs next depends on, except the clock and the budget."""

    ended: tuple[FinishedTrial, ...] = ()
    """Finished trials, by number."""
    waiting: tuple[WaitingTrial, ...] = ()
    """Trials that have to run again, by number."""
    running: tuple[RunningTrial, ...] = ()
    """Trials in flight, in the order of their start."""
    lost_s: float = 0.0
    """Wall clock in seconds of attempts that were followed by another attempt."""
    centres: tuple[int, ...] = ()
    """Numbers of the trials that the refinement varies; empty while the grid is searched."""
    is_out_of_time: bool = False
    """Whether the deadline has ended the search. The search stays ended, even if the finals go faster than expected."""
    failures: int = 0
    """Infrastructure failures in a row; among them the unexplained failures before the machine is proven."""
    last_failure: str = ""
    """What the last of these failures was."""
    halt: Halt = Halt.NONE

    @property
    def next_number(self) -> int:
        """The number of the next new trial; numbers have no gap."""
        return len(self.ended) + len(self.waiting) + len(self.running)

    @property
    def is_proven(self) -> bool:
        """Whether a trial has run steps, so that an unexplained failure is the layout's rather than the machine's."""
        return any(trial.result.outcome in RAN for trial in self.ended)

    @property
    def is_broken(self) -> bool:
        """Whether the machine fails so often that the sweep stops."""
        return self.failures >= FAILURES_TO_STOP

    def layouts(self) -> dict[int, Layout]:
        """The layout of every trial that was ever begun, by number."""
        begun = {
            **{trial.number: trial.layout for trial in self.ended},
            **{trial.number: trial.layout for trial in self.waiting},
            **{trial.number: trial.layout for trial in self.running},
        }
        return {number: begun[number] for number in sorted(begun)}

    def running_trial(self, number: int) -> RunningTrial:
        """The trial of this number that is in flight; raises KeyError if there is none."""
        for trial in self.running:
            if trial.number == number:
                return trial
        raise KeyError(number)


@dataclass(frozen=True, slots=True)
class TrialBegan:
    """An attempt at a trial starts."""

    trial: RunningTrial


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial is over; it does not run again."""

    trial: FinishedTrial


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt ended for a reason that another attempt may change, or because somebody stopped it."""

    number: int
    result: TrialResult


@dataclass(frozen=True, slots=True)
class BeginFailed:
    """No trial can begin, since the results folder cannot be written; it counts as an infrastructure failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class RefinementBegan:
    """The grid is searched; from now on the other knobs vary around these trials."""

    centres: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimeRanOut:
    """The deadline leaves no time for another trial of the search."""


@dataclass(frozen=True, slots=True)
class HaltAsked:
    """Somebody asked the sweep to pause, to go on, or to stop."""

    halt: Halt


Event = TrialBegan | TrialEnded | AttemptFailed | BeginFailed | RefinementBegan | TimeRanOut | HaltAsked


def advanced(state: SweepState, event: Event) -> SweepState:
    """The state after an event."""
    match event:
        case TrialBegan(trial):
            waiting = tuple(other for other in state.waiting if other.number != trial.number)
            return replace(state, waiting=waiting, running=(*state.running, trial))
        case TrialEnded(trial):
            return replace(
                _without_running(state, trial.number, trial.result),
                ended=tuple(sorted((*state.ended, trial), key=lambda other: other.number)),
            )
        case AttemptFailed(number, result):
            return _attempt_failed(state, state.running_trial(number), result)
        case BeginFailed(reason):
            return replace(state, failures=state.failures + 1, last_failure=reason)
        case RefinementBegan(centres):
            return replace(state, centres=centres)
        case TimeRanOut():
            return replace(state, is_out_of_time=True)
        case HaltAsked(halt):
            # A stop cannot be taken back: its trials are already being ended.
            return state if state.halt is Halt.STOPPING else replace(state, halt=halt)


def is_over(result: TrialResult, attempt: int) -> bool:
    """Whether a trial is over after this attempt, from 1; if not, it waits to run again."""
    return attempts_spent(attempt, result) is None


def attempts_spent(attempt: int, result: TrialResult | None) -> int | None:
    """How many attempts count against a trial that has to run again; None if the trial is over.

    Args:
        attempt: The number of the last attempt begun, from 1.
        result: How that attempt ended; None if the tuner was killed before it did.
    """
    if result is None or result.outcome is Outcome.INTERRUPTED:
        return attempt - 1
    if result.outcome is Outcome.INFRASTRUCTURE:
        return 0
    may_change = result.outcome in RETRIED or bool(result.occupied_gpus)
    return attempt if may_change and attempt == 1 else None


def tried_again(state: SweepState, unexplained: Sequence[WaitingTrial]) -> SweepState:
    """Return the state of a resumed sweep in which ended trials that failed for an unknown reason run once more.

    They do so only if no trial has run: the sweep may have stopped for them, and the machine be repaired since.
    """
    numbers = {trial.number for trial in unexplained}
    if state.is_proven or not numbers:
        return state
    return replace(
        state,
        ended=tuple(trial for trial in state.ended if trial.number not in numbers),
        waiting=tuple(sorted((*state.waiting, *unexplained), key=lambda trial: trial.number)),
        lost_s=state.lost_s
        + sum(trial.result.durations.total_s for trial in state.ended if trial.number in numbers),
    )


def _without_running(state: SweepState, number: int, result: TrialResult) -> SweepState:
    is_unexplained = result.outcome is Outcome.UNEXPLAINED and not state.is_proven
    is_failure = is_unexplained or result.outcome is Outcome.INFRASTRUCTURE
    reason = f"{result.reason}; {_UNEXPLAINED}" if is_unexplained else result.reason
    return replace(
        state,
        running=tuple(other for other in state.running if other.number != number),
        failures=state.failures + 1 if is_failure else 0,
        last_failure=reason if is_failure else state.last_failure,
    )


def _attempt_failed(state: SweepState, trial: RunningTrial, result: TrialResult) -> SweepState:
    is_interrupted = result.outcome is Outcome.INTERRUPTED
    again = WaitingTrial(
        number=trial.number,
        layout=trial.layout,
        source=trial.source,
        attempts_spent=trial.attempt - 1 if is_interrupted else trial.attempt,
    )
    state = replace(
        _without_running(state, trial.number, result),
        waiting=tuple(sorted((*state.waiting, again), key=lambda other: other.number)),
        lost_s=state.lost_s + result.durations.total_s,
    )
    return replace(state, halt=Halt.STOPPING) if is_interrupted else state
