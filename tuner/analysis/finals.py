"""The finals: the fastest layouts and the baseline run again, interleaved; and which trials are repeated first. Pure.

Everything follows from the finished trials, so a resumed sweep continues its finals where they stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from tuner.analysis.candidates import candidates, ruled_out
from tuner.analysis.drift import drift
from tuner.analysis.runs import baseline_layout, finals_of
from tuner.core.layout import Layout
from tuner.trial.contract import Outcome
from tuner.trial.finished import SEARCHED, FinishedTrial

FEWEST_RUNS: Final = 2
"""Fewest runs per layout in the finals: a single run does not show how much runs differ."""


@dataclass(frozen=True, slots=True)
class FinalsPlan:
    """How large the finals are."""

    finalists: int
    """How many layouts run in the finals besides the baseline."""
    runs: int
    """How often each finalist runs, and the baseline too."""

    @property
    def trials(self) -> int:
        """The number of trials in the finals, if a baseline completed."""
        return (self.finalists + 1) * self.runs if self.finalists else 0

    def smaller(self) -> "FinalsPlan":
        """Return the next smaller finals: with fewer finalists, then with fewer runs, then none."""
        if self.finalists > 1:
            return FinalsPlan(self.finalists - 1, self.runs)
        return FinalsPlan(1, self.runs - 1) if self.runs > FEWEST_RUNS else FinalsPlan(0, 0)


def fitting_plan(
    wanted: FinalsPlan, finalists: int, trials: float, seconds: float, trial_s: float
) -> FinalsPlan:
    """Return the largest finals that fit.

    Args:
        wanted: the finals that the sweep asks for.
        finalists: how many layouts may run in them, besides the baseline.
        trials: how many trials may still run.
        seconds: how long the finals may take.
        trial_s: the expected duration of one final in seconds.
    """
    if not finalists or not wanted.runs:
        return FinalsPlan(0, 0)
    plan = FinalsPlan(min(wanted.finalists, finalists), wanted.runs)
    while plan.trials and (plan.trials > trials or plan.trials * trial_s > seconds):
        plan = plan.smaller()
    return plan


def eligible_finalists(trials: Sequence[FinishedTrial]) -> list[Layout]:
    """Return the layouts that may run in the finals, fastest first, without the baseline."""
    trials = sorted(trials, key=lambda trial: trial.number)
    start = baseline_layout(trials)
    layouts = [candidate.trial.layout for candidate in candidates(trials, drift(trials), ruled_out(trials))]
    return [layout for layout in layouts if layout != start]


def next_final(trials: Sequence[FinishedTrial], plan: FinalsPlan) -> Layout | None:
    """Return the layout that runs next in the finals; None if they are over or there is nothing to compare.

    The finals run in rounds, the fastest layout first and the baseline last. Every other round runs in the reverse
    order, so that a drift of the machine favours no layout.
    """
    trials = sorted(trials, key=lambda trial: trial.number)
    finalists = eligible_finalists(trials)[: plan.finalists]
    out, start = ruled_out(trials), baseline_layout(trials)
    finals = [trial.layout for trial in finals_of(trials)]
    if start is not None and start not in out and _has_completed(trials, start):
        finalists.append(start)
    if len(finalists) < 2 or not plan.runs:
        return None
    rounds = min(finals.count(layout) for layout in finalists)
    if rounds >= plan.runs:
        return None
    ordered = finalists if rounds % 2 == 0 else finalists[::-1]
    return next(layout for layout in ordered if finals.count(layout) == rounds)


def _has_completed(trials: Sequence[FinishedTrial], layout: Layout) -> bool:
    return any(trial.layout == layout and trial.result.metrics is not None for trial in trials)


def trials_to_repeat(trials: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """Return the trials of the search that the machine disturbed and that have no repeat yet, fastest first."""
    repeated = {trial.layout for trial in trials if trial.source == "repeat"}
    disturbed = [
        trial
        for trial in trials
        if trial.source in SEARCHED
        and trial.result.suspicions
        and trial.layout not in repeated
        and (trial.result.metrics is not None or trial.result.outcome is Outcome.TOO_SLOW)
    ]
    return sorted(disturbed, key=lambda trial: (_measured_or_bound_ms(trial), trial.number))


def _measured_or_bound_ms(trial: FinishedTrial) -> float:
    """Return the measured step time in ms, or the lower bound of it that a trial stopped as too slow gives."""
    metrics = trial.result.metrics
    return metrics.step_time_ms if metrics else trial.result.slower_than_ms or 0.0


def expected_trial_s(trials: Sequence[FinishedTrial], layouts: Sequence[Layout] = ()) -> float:
    """Return how long the next trial is expected to take, in seconds.

    It is the largest over `layouts` of the median duration of the layout's completed trials. A layout that never
    completed counts with the median of all completed trials, and so does an empty `layouts`. The result is 0 before
    the first completed trial.
    """
    completed = [trial for trial in trials if trial.result.metrics is not None]
    usual_s = median(_durations_s(completed)) if completed else 0.0
    if not layouts:
        return usual_s
    return max(
        median(_durations_s([trial for trial in completed if trial.layout == layout]) or [usual_s])
        for layout in layouts
    )


def _durations_s(trials: Sequence[FinishedTrial]) -> list[float]:
    return [trial.result.durations.total_s for trial in trials]
