"""What the result of a trial says about its row of the table, and the state that each outcome has in Optuna."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from optuna.trial import TrialState

from tuner.trial.contract import Outcome, TrialResult

STATES: Mapping[Outcome, TrialState] = {
    Outcome.COMPLETED: TrialState.COMPLETE,
    Outcome.OOM: TrialState.PRUNED,
    Outcome.INVALID: TrialState.PRUNED,
    Outcome.HANG: TrialState.PRUNED,
    Outcome.TIMEOUT: TrialState.PRUNED,
    Outcome.TOO_SLOW: TrialState.PRUNED,
    Outcome.COMMUNICATION: TrialState.FAIL,
    Outcome.NAN: TrialState.FAIL,
    Outcome.INFRASTRUCTURE: TrialState.WAITING,
    Outcome.INTERRUPTED: TrialState.WAITING,
    Outcome.UNEXPLAINED: TrialState.PRUNED,
}
"""The state that each outcome has in Optuna. WAITING trials run again, with the same number and layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What an ended trial says about its row."""

    state: TrialState
    """The trial's state in Optuna: COMPLETE, PRUNED or FAIL."""
    step_time_ms: float | None = None
    """The measured step time; None unless the trial completed."""
    slower_than_ms: float | None = None
    """A lower bound of the step time, if the trial ended before it measured one."""
    peak_gib: float | None = None
    """The worst rank's peak of allocated memory; None unless the trial completed or was stopped as too slow."""
    out_of_memory: bool = False
    fixed_s: float = 0.0
    """Seconds that the trial took besides its steps: start-up, build and teardown."""
    steps: int = 0
    """Optimizer steps of a completed trial, warm-up included."""

    @classmethod
    def of(cls, result: TrialResult) -> Self:
        """Return the observation that a result makes; the trial must not be one that runs again."""
        metrics, durations = result.metrics, result.durations
        return cls(
            state=STATES[result.outcome],
            step_time_ms=metrics.step_time_ms if metrics else None,
            slower_than_ms=result.slower_than_ms,
            peak_gib=_peak_gib(result),
            out_of_memory=result.is_too_large,
            fixed_s=durations.total_s - durations.warmup_s - durations.measure_s,
            steps=len(metrics.losses) if metrics else 0,
        )


def _peak_gib(result: TrialResult) -> float | None:
    if result.metrics is not None:
        return result.metrics.peak_allocated_gib
    if result.outcome is not Outcome.TOO_SLOW:
        return None
    peaks = [record.peak_allocated_gib for record in result.ranks if record.peak_allocated_gib is not None]
    return max(peaks, default=None)
