"""Decides which runs of a layout count: finals after the search, and a repeat instead of a disturbed measurement."""

from collections.abc import Sequence

from tuner.core.layout import Layout
from tuner.trial.contract import Metrics, Outcome
from tuner.trial.finished import SEARCHED, FinishedTrial


def finals_of(trials: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """Return the finals that count, which are those after the last trial with another source than `final`.

    `trials` must be sorted by number.
    """
    last_searched = max((place for place, trial in enumerate(trials) if trial.source != "final"), default=-1)
    return list(trials[last_searched + 1 :])


def baseline_layout(trials: Sequence[FinishedTrial]) -> Layout | None:
    """Return the layout of the baseline; None if the baseline's trial is not among the trials."""
    return next((trial.layout for trial in trials if trial.source == "baseline"), None)


def counting_trials(trials: Sequence[FinishedTrial]) -> dict[int, FinishedTrial]:
    """Return, by the number of each trial of the search, the run that counts for it: the trial itself or its repeat.

    The repeat counts if the trial was disturbed and the repeat was not. If both were disturbed, the faster of them
    counts, since a disturbance can only slow a run down.
    """
    counting: dict[int, FinishedTrial] = {}
    disturbed: dict[Layout, list[int]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.source in SEARCHED:
            counting[trial.number] = trial
            if trial.result.suspicions:
                disturbed.setdefault(trial.layout, []).append(trial.number)
        elif trial.source == "repeat":
            for number in disturbed.get(trial.layout, ()):
                if counting[number].result.suspicions:
                    counting[number] = _less_disturbed(counting[number], trial)
    return counting


def _less_disturbed(first: FinishedTrial, repeat: FinishedTrial) -> FinishedTrial:
    if repeat.result.outcome is Outcome.TOO_SLOW and not repeat.result.suspicions:
        return repeat
    first_metrics, repeat_metrics = first.result.metrics, repeat.result.metrics
    if first_metrics is None or repeat_metrics is None:
        return first
    faster = repeat_metrics.step_time_ms < first_metrics.step_time_ms
    return repeat if faster or not repeat.result.suspicions else first


def middle_run(runs: Sequence[FinishedTrial]) -> FinishedTrial:
    """Return the run with the median step time; for an even number of runs, the faster of the two in the middle.

    All runs must have completed.
    """
    ordered = sorted(runs, key=lambda run: (measured_metrics(run).step_time_ms, run.number))
    return ordered[(len(ordered) - 1) // 2]


def measured_metrics(run: FinishedTrial) -> Metrics:
    """Return the metrics of a completed run; fails an assertion for any other run."""
    assert run.result.metrics is not None, "only completed runs are pooled"
    return run.result.metrics
