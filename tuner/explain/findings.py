"""What a sweep's trials say beside which was fastest: how the predictions held, and which choices mattered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.analysis.figures import best_trial
from tuner.core.choices import CHOICES, codes_of, one_step, value_of
from tuner.core.layout import DEFAULTS, Layout
from tuner.explain.evidence import Evidence
from tuner.explain.importance import importances
from tuner.explain.neighbours import Neighbour, neighbours
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import StageMemory
from tuner.predict.memory.peak import breakdown as memory_breakdown
from tuner.predict.time.step import StepTime
from tuner.predict.time.step import breakdown as time_breakdown
from tuner.space.table import find_row, layout_at
from tuner.trial.finished import FinishedTrial

Floats = NDArray[np.float64]

RANKED: Final = 5
"""Trials from which a rank correlation says anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedTrial:
    """A trial beside what was predicted of it before any trial."""

    trial: FinishedTrial
    predicted_ms: float
    predicted_gib: float
    predicted_fit: float
    """P(peak <= the GPU's memory)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How predictions held on the completed trials."""

    trials: int
    factor: float
    """Geometric mean of measured / predicted: what all predictions are off by."""
    error: float
    """Mean of |measured / (factor * predicted) - 1|: what single ones are off by beyond that."""
    spearman: float | None
    """Rank correlation of predicted and measured; None below RANKED trials, or where either is constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceEffect:
    """What changing one choice did to the step time, over the pairs of trials that differ in it and what it forces."""

    choice: str
    before: str
    after: str
    change: float
    """Geometric mean of the ratios of measured step times, less 1: -0.1 is a tenth less time."""
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutPrediction:
    """What is predicted of one layout, and what the trials make of it."""

    layout: Layout
    step: StepTime
    """Before any trial; likewise `memory`."""
    memory: StageMemory
    """The worst pipeline stage's."""
    expected_ms: float
    fit: float
    """P(peak <= the GPU's memory); both corrected by the trials."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the trials of a sweep say."""

    predicted_trials: tuple[PredictedTrial, ...]
    time: Accuracy | None
    """None where no trial completed; likewise the next."""
    memory: Accuracy | None
    importances: Mapping[str, float]
    """Share of the variance of log(step time) by choice; empty where too few trials completed."""
    effects: tuple[ChoiceEffect, ...]
    """The strongest first."""
    best: LayoutPrediction | None
    """Of the fastest trial's layout; None where no trial completed."""
    neighbours: tuple[Neighbour, ...]
    """Of the same."""


def findings(evidence: Evidence) -> Findings:
    """Everything that the trials of a sweep say."""
    measured = [
        (row, trial.layout, trial.result.metrics)
        for row, trial in zip(evidence.rows, evidence.trials, strict=True)
        if trial.result.metrics is not None
    ]
    rows = np.array([row for row, _, _ in measured], dtype=np.intp)
    steps = np.array([metrics.step_time_ms for _, _, metrics in measured])
    peaks = np.array([metrics.peak_allocated_gib for _, _, metrics in measured])
    fastest = best_trial(evidence.trials)
    return Findings(
        predicted_trials=predicted_trials(evidence),
        time=accuracy(evidence.predicted_ms[rows], steps),
        memory=accuracy(evidence.predicted_gib[rows], peaks),
        importances=importances([layout for _, layout, _ in measured], steps.tolist()),
        effects=choice_effects(evidence.table, rows, steps),
        best=predict_layout(evidence, fastest.layout) if fastest else None,
        neighbours=neighbours(evidence, fastest) if fastest else (),
    )


def predict_layout(evidence: Evidence, layout: Layout) -> LayoutPrediction:
    """What is predicted of a layout that is a row of the table."""
    workload, cluster = evidence.sweep.workload, evidence.sweep.cluster
    row, implementation = find_row(evidence.table, layout), implementation_of(cluster)
    assert row is not None, "the layout is a row of the table"
    stages = memory_breakdown(layout, workload, cluster, implementation)
    return LayoutPrediction(
        layout=layout,
        step=time_breakdown(layout, workload, cluster, implementation, evidence.calibration),
        memory=max(stages, key=lambda stage: stage.total_gib),
        expected_ms=float(evidence.expected_ms[row]),
        fit=float(evidence.fit[row]),
    )


def predicted_trials(evidence: Evidence) -> tuple[PredictedTrial, ...]:
    """Every trial beside its prediction."""
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
    """How predictions above 0 held against measurements above 0, one a trial; None without any."""
    if not len(measured):
        return None
    ratio = measured / predicted
    factor = float(np.exp(np.log(ratio).mean()))
    ranks = [pd.Series(values).rank() for values in (predicted, measured)]
    ranked = len(measured) >= RANKED and all(rank.nunique() > 1 for rank in ranks)
    return Accuracy(
        trials=len(measured),
        factor=factor,
        error=float(np.abs(ratio / factor - 1).mean()),
        spearman=float(ranks[0].corr(ranks[1])) if ranked else None,
    )


def choice_effects(table: pd.DataFrame, rows: NDArray[np.intp], step_ms: Floats) -> tuple[ChoiceEffect, ...]:
    """What changing each choice did, from measured pairs one step apart; the strongest first.

    Args:
        table: The valid layouts: they say what a change forces.
        rows: The row of each completed trial.
        step_ms: What each measured.
    """
    codes, names = codes_of(table), list(CHOICES)
    logs = {int(row): float(np.log(ms)) for row, ms in zip(rows, step_ms, strict=True)}
    layouts = {row: layout_at(table, row) for row in logs}
    changes: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
    for row in logs:
        for choice, others in one_step(codes, row):
            for other in set(others.tolist()) & logs.keys():
                name = names[choice]
                before, after = sorted((row, other), key=lambda each: _order(name, layouts[each]))
                key = (name, value_of(name, layouts[before]), value_of(name, layouts[after]))
                changes.setdefault(key, {})[before, after] = logs[after] - logs[before]
    found = [
        ChoiceEffect(
            choice=name,
            before=b,
            after=a,
            change=float(np.expm1(np.mean(list(pairs.values())))),
            pairs=len(pairs),
        )
        for (name, b, a), pairs in changes.items()
    ]
    return tuple(sorted(found, key=lambda effect: -abs(np.log1p(effect.change))))


def _order(choice: str, layout: Layout) -> tuple[tuple[int, str], ...]:
    """Which of two values is told first: the smaller, what is off; of texts the default."""
    taken = ((knob, getattr(layout, knob)) for knob in CHOICES[choice])
    return tuple(
        (int(value != DEFAULTS[knob]), value) if isinstance(value, str) else (int(value), "")
        for knob, value in taken
    )
