"""Lists the layouts that the search measured: those that may win, and those that cannot win, with the reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.analysis.drift import Drift
from tuner.analysis.losses import trains_differently
from tuner.analysis.runs import counting_trials, finals_of
from tuner.core.layout import Layout
from tuner.trial.contract import Metrics
from tuner.trial.finished import UNFINISHED, FinishedTrial


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that the search measured, with the trial whose measurement counts for the layout."""

    trial: FinishedTrial
    metrics: Metrics
    """The trial's metrics as measured, without a correction for the machine's drift."""
    factor: float
    """The machine's drift: how long the same step takes at the time of the trial, divided by how long it takes at the
    start of the sweep."""

    @property
    def step_time_ms(self) -> float:
        """The step time in ms, corrected for drift: as it would have been at the start of the sweep."""
        return self.metrics.step_time_ms / self.factor


def candidates(
    trials: Sequence[FinishedTrial], machine_drift: Drift | None, out: Mapping[Layout, str]
) -> list[Candidate]:
    """Return one candidate per layout that the search measured, fastest first; of equally fast ones the earlier first.

    Args:
        trials: the finished trials of a sweep.
        machine_drift: the drift for which step times are corrected; None for no correction.
        out: the layouts to leave out, because they cannot win.
    """
    measured = [
        Candidate(
            trial=trial,
            metrics=trial.result.metrics,
            factor=machine_drift.factor(trial) if machine_drift else 1.0,
        )
        for trial in counting_trials(trials).values()
        if trial.result.metrics is not None and not (out and trial.layout in out)
    ]
    measured.sort(key=lambda candidate: (candidate.step_time_ms, candidate.trial.number))
    fastest: dict[Layout, Candidate] = {}
    for candidate in measured:
        fastest.setdefault(candidate.trial.layout, candidate)
    return list(fastest.values())


def ruled_out(trials: Sequence[FinishedTrial]) -> dict[Layout, str]:
    """Return the measured layouts that cannot win, each with the reason: its final failed, or it trains differently."""
    failed = {
        trial.layout: f"failed in the final t{trial.number:04d}: {trial.result.outcome}: {trial.result.reason}"
        for trial in finals_of(trials)
        if trial.result.metrics is None
        and trial.result.outcome not in UNFINISHED
        and not trial.result.occupied_gpus
    }
    return {**trains_differently(trials), **failed}
