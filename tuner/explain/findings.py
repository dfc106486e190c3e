"""What a sweep's trials say besides which layout is fastest: how predictions held, and which choices mattered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.analysis.figures import best_trial
from tuner.core.choices import CHOICES, Steps, codes_of, value_of
from tuner.core.columns import Floats
from tuner.core.layout import DEFAULTS, Layout
from tuner.explain.evidence import Evidence
from tuner.explain.importance import importances
from tuner.explain.neighbours import Neighbour, neighbours
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import StageMemory, memory_breakdown
from tuner.predict.time.step import StepTime, step_breakdown
from tuner.space.table import find_row, layouts_at
from tuner.trial.finished import FinishedTrial

FEWEST_RANKED: Final = 5
"""Fewest trials that a rank correlation is computed from. Assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedTrial:
    """A trial, and what was predicted of its layout before any trial."""

    trial: FinishedTrial
    predicted_ms: float
    """The predicted step time."""
    predicted_gib: float
    """The predicted peak of memory."""
    predicted_fit: float
    """The probability that the peak is at most the GPU's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How well predictions agree with the measurements of the completed trials."""

    trials: int
    """The number of completed trials."""
    factor: float
    """The geometric mean of measured / predicted: the error that all predictions share."""
    error: float
    """The mean of |measured / (factor * predicted) - 1|: the error that is left after correction by `factor`."""
    spearman: float | None
    """The rank correlation of predicted and measured; None below FEWEST_RANKED trials, or if either is constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceEffect:
    """What a change of one choice did to the step time.

    The effect is taken over the pairs of trials that differ in this choice, and otherwise only in choices that a change
    of this choice forces to change.
    """

    choice: str
    before: str
    """The value that the change starts from."""
    after: str
    """The value that the change leads to."""
    change: float
    """The geometric mean of the ratios of measured step times, minus 1; -0.1 means that a step takes a tenth less."""
    pairs: int
    """The number of pairs of trials."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutPrediction:
    """What is predicted of one layout, before any trial and after the sweep's trials."""

    layout: Layout
    step: StepTime
    """The parts of the predicted step time, before any trial."""
    memory: StageMemory
    """The parts of the predicted peak of memory on the worst pipeline stage, before any trial."""
    expected_ms: float
    """The predicted step time, corrected by the trials."""
    fit: float
    """The probability that the peak is at most the GPU's memory, corrected by the trials."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the trials of a sweep say."""

    predicted_trials: tuple[PredictedTrial, ...]
    """Every trial with its prediction."""
    time: Accuracy | None
    """How well predicted step times held; None if no trial completed."""
    memory: Accuracy | None
    """How well predicted peaks of memory held; None if no trial completed."""
    importances: Mapping[str, float]
    """Each choice's share of the variance of log(step time); empty if too few trials completed."""
    effects: tuple[ChoiceEffect, ...]
    """The effects of changing one choice on the step time, the strongest first."""
    best: LayoutPrediction | None
    """The prediction for the best trial's layout; None if no trial completed."""
    neighbours: tuple[Neighbour, ...]
    """The neighbours of the best trial's layout; empty if no trial completed."""


def findings(evidence: Evidence) -> Findings:
    """Return everything that the trials of a sweep say."""
    measured = [
        (row, trial.layout, trial.result.metrics)
        for row, trial in zip(evidence.rows, evidence.trials, strict=True)
        if trial.result.metrics is not None
    ]
    rows = np.array([row for row, _, _ in measured], dtype=np.intp)
    steps_ms = np.array([metrics.step_time_ms for _, _, metrics in measured])
    peaks_gib = np.array([metrics.peak_allocated_gib for _, _, metrics in measured])
    best = best_trial(evidence.trials)
    return Findings(
        predicted_trials=predicted_trials(evidence),
        time=accuracy(evidence.predicted_ms[rows], steps_ms),
        memory=accuracy(evidence.predicted_gib[rows], peaks_gib),
        importances=importances([layout for _, layout, _ in measured], steps_ms.tolist()),
        effects=choice_effects(evidence.table, rows, steps_ms),
        best=predict_layout(evidence, best.layout) if best else None,
        neighbours=neighbours(evidence, best) if best else (),
    )


def predict_layout(evidence: Evidence, layout: Layout) -> LayoutPrediction:
    """Return what is predicted of a layout, which must be a row of the evidence's table."""
    workload, cluster = evidence.sweep.workload, evidence.sweep.cluster
    row, implementation = find_row(evidence.table, layout), implementation_of(cluster)
    assert row is not None, "the layout is a row of the table"
    stages = memory_breakdown(layout, workload, cluster, implementation)
    return LayoutPrediction(
        layout=layout,
        step=step_breakdown(layout, workload, cluster, implementation, evidence.calibration),
        memory=max(stages, key=lambda stage: stage.total_gib),
        expected_ms=float(evidence.expected_ms[row]),
        fit=float(evidence.fit[row]),
    )


def predicted_trials(evidence: Evidence) -> tuple[PredictedTrial, ...]:
    """Return every trial with its prediction."""
    return tuple(
        PredictedTrial(
            trial=trial,
            predicted_ms=float(evidence.predicted_ms[row]),
            predicted_gib=float(evidence.predicted_gib[row]),
            predicted_fit=float(evidence.predicted_fit[row]),
        )
        for row, trial in zip(evidence.rows, evidence.trials, strict=True)
    )


def accuracy(predicted: Floats, measured: Floats) -> Accuracy | None:
    """Return how well predictions hold against measurements; None if there are none.

    Args:
        predicted: the predictions, all above 0, of shape [trials].
        measured: the measurements in the same unit, all above 0, of shape [trials].
    """
    if not len(measured):
        return None
    ratio = measured / predicted
    factor = float(np.exp(np.log(ratio).mean()))
    ranks = [pd.Series(values).rank() for values in (predicted, measured)]
    are_ranked = len(measured) >= FEWEST_RANKED and all(rank.nunique() > 1 for rank in ranks)
    return Accuracy(
        trials=len(measured),
        factor=factor,
        error=float(np.abs(ratio / factor - 1).mean()),
        spearman=float(ranks[0].corr(ranks[1])) if are_ranked else None,
    )


def choice_effects(table: pd.DataFrame, rows: NDArray[np.intp], step_ms: Floats) -> tuple[ChoiceEffect, ...]:
    """Return the effects of changing one choice, the strongest first, from pairs of measured rows that differ in it.

    Args:
        table: the valid layouts; they say which other choices a change forces.
        rows: the row of each completed trial, of shape [trials].
        step_ms: the measured step time of each of these trials, of shape [trials].
    """
    steps, choices = Steps(codes_of(table)), list(CHOICES)
    log_ms = {int(row): float(np.log(ms)) for row, ms in zip(rows, step_ms, strict=True)}
    layouts = dict(zip(log_ms, layouts_at(table, list(log_ms)), strict=True))
    # Keyed by choice, value before and value after; then by the pair of rows, so that no pair counts twice.
    changes: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
    for row in log_ms:
        for number, others in steps.around(row):
            choice = choices[number]
            for other in set(others.tolist()) & log_ms.keys():
                before, after = sorted((row, other), key=lambda each: _order(choice, layouts[each]))
                key = (choice, value_of(choice, layouts[before]), value_of(choice, layouts[after]))
                changes.setdefault(key, {})[before, after] = log_ms[after] - log_ms[before]
    effects = [
        ChoiceEffect(
            choice=choice,
            before=before_value,
            after=after_value,
            change=float(np.expm1(np.mean(list(pairs.values())))),
            pairs=len(pairs),
        )
        for (choice, before_value, after_value), pairs in changes.items()
    ]
    return tuple(sorted(effects, key=lambda effect: -abs(np.log1p(effect.change))))


def _order(choice: str, layout: Layout) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts first the value that a change starts from: the smaller size, off, or the default."""
    values = ((knob, getattr(layout, knob)) for knob in CHOICES[choice])
    return tuple(
        (int(value != DEFAULTS[knob]), value) if isinstance(value, str) else (int(value), "")
        for knob, value in values
    )
