"""Which runs of a layout count: the finals after the search, and a repeat in place of a disturbed measurement. Pure."""

from collections.abc import Sequence

from tuner.core.layout import Layout
from tuner.trial.contract import Metrics, Outcome
from tuner.trial.finished import SEARCHED, FinishedTrial


def finals_of(trials: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """Return the finals that count: those after the last trial that is no final. `trials` are sorted by number."""
    last_searched = max((place for place, trial in enumerate(trials) if trial.source != "final"), default=-1)
    return list(trials[last_searched + 1 :])


def baseline_layout(trials: Sequence[FinishedTrial]) -> Layout | None:
    """Return the layout to beat; None before its trial has ended."""
    return next((trial.layout for trial in trials if trial.source == "baseline"), None)


def counting_trials(trials: Sequence[FinishedTrial]) -> dict[int, FinishedTrial]:
    """Return the run that counts for each trial of the search, keyed by the number of that trial.

    It is the trial itself, or its repeat if the machine disturbed the first measurement. If both were disturbed, the
    faster run counts: a disturbance can only slow a run down.
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
    """Return the completed run with the median step time; the faster of the two middle ones for an even count."""
    ordered = sorted(runs, key=lambda run: (measured_metrics(run).step_time_ms, run.number))
    return ordered[(len(ordered) - 1) // 2]


def measured_metrics(run: FinishedTrial) -> Metrics:
    """Return the metrics of a run that is known to have completed."""
    assert run.result.metrics is not None, "only completed runs are pooled"
    return run.result.metrics
