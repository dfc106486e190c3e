"""Decides what runs in the finals, in which the fastest layouts and the baseline run again, interleaved.

It also decides which disturbed trials are repeated before. Everything is computed from the finished trials, so a
resumed sweep continues its finals where it stopped.
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
"""The fewest runs per layout in the finals: a single run does not show how much runs differ."""


@dataclass(frozen=True, slots=True)
class FinalsPlan:
    """The size of the finals."""

    finalists: int
    """The number of layouts that run in the finals in addition to the baseline."""
    runs: int
    """The number of runs of each finalist and of the baseline."""

    @property
    def trials(self) -> int:
        """The number of trials in the finals, provided that the baseline completed."""
        return (self.finalists + 1) * self.runs if self.finalists else 0

    def smaller(self) -> "FinalsPlan":
        """Return the next smaller plan: one finalist fewer; with one finalist, one run fewer; below FEWEST_RUNS, none.

        The plan without finals has 0 finalists and 0 runs.
        """
        if self.finalists > 1:
            return FinalsPlan(self.finalists - 1, self.runs)
        return FinalsPlan(1, self.runs - 1) if self.runs > FEWEST_RUNS else FinalsPlan(0, 0)


def fitting_plan(
    wanted: FinalsPlan, finalists: int, trials: float, seconds: float, trial_s: float
) -> FinalsPlan:
    """Return the largest plan, at most as large as wanted, that fits into the trials and the time that are left.

    Args:
        wanted: the plan that the sweep asks for.
        finalists: the number of layouts that are eligible, without the baseline.
        trials: the number of trials that may still run.
        seconds: the time that the finals may take, in seconds.
        trial_s: the expected duration of one final, in seconds.
    """
    if not finalists or not wanted.runs:
        return FinalsPlan(0, 0)
    plan = FinalsPlan(min(wanted.finalists, finalists), wanted.runs)
    while plan.trials and (plan.trials > trials or plan.trials * trial_s > seconds):
        plan = plan.smaller()
    return plan


def eligible_finalists(trials: Sequence[FinishedTrial]) -> list[Layout]:
    """Return the layouts that may run in the finals in addition to the baseline, fastest first."""
    trials = sorted(trials, key=lambda trial: trial.number)
    start = baseline_layout(trials)
    layouts = [candidate.trial.layout for candidate in candidates(trials, drift(trials), ruled_out(trials))]
    return [layout for layout in layouts if layout != start]


def next_final(trials: Sequence[FinishedTrial], plan: FinalsPlan) -> Layout | None:
    """Return the layout that runs next in the finals; None if they are over, or fewer than two layouts can run.

    The finals run in rounds. In each round, every finalist runs once, from the fastest to the slowest, and then the
    baseline. Every second round runs in the reverse order, so that a drift of the machine favours no layout.
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
    """Return the trials of the search that were disturbed on the machine and have not been repeated, fastest first.

    A trial that ended as too slow is among them, with its lower bound in place of the step time.
    """
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
    """Return a trial's step time in ms, or its lower bound if the trial ended as too slow, before it measured one."""
    metrics = trial.result.metrics
    return metrics.step_time_ms if metrics else trial.result.slower_than_ms or 0.0


def expected_trial_s(trials: Sequence[FinishedTrial], layouts: Sequence[Layout] = ()) -> float:
    """Return the expected duration of the next trial in seconds, if it runs one of `layouts`.

    For one layout it is the median duration of the layout's completed trials, or of all completed trials if the layout
    has none. The result is the largest of these over `layouts`; if `layouts` is empty, the median over all completed
    trials. It is 0 if no trial has completed.
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
