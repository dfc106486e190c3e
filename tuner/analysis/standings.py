"""Layouts ranked by step time: by one measurement each in the search, by all of their runs after the finals. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from tuner.analysis.bootstrap import pooled_log_times
from tuner.analysis.candidates import Candidate
from tuner.analysis.runs import measured_metrics, middle_run
from tuner.core.layout import Layout
from tuner.trial.contract import Metrics
from tuner.trial.finished import FinishedTrial

TAILS: Final = (0.025, 0.975)
"""The quantiles that enclose a 95% interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimeRatio:
    """One step time divided by another one, with the 95% interval of the ratio."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @property
    def is_tie(self) -> bool:
        """Whether the interval includes 1: noise cannot tell which of the two is faster."""
        return self.low <= 1 <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One layout's place in a ranking."""

    layout: Layout
    runs: tuple[FinishedTrial, ...]
    """The runs that count for the layout: its finals, or its one measurement in the search."""
    metrics: Metrics
    """The pooled metrics of these runs."""
    over_best: StepTimeRatio
    """The layout's step time divided by the best layout's.

    In a ranking of the search, the machine's drift is taken out, and the interval is wider than a 95% interval: its
    lower end is the lower end of this layout's interval divided by the upper end of the best's, and its upper end is
    the upper end of this layout's interval divided by the lower end of the best's.
    """

    @property
    def trial(self) -> FinishedTrial:
        """The run with the median step time, which represents all runs."""
        return middle_run(self.runs)


def rank_candidates(candidates: Sequence[Candidate]) -> list[Standing]:
    """Return the standings of layouts that the search measured once each, given and returned fastest first."""
    if not candidates:
        return []
    best = candidates[0]
    return [
        Standing(
            layout=candidate.trial.layout,
            runs=(candidate.trial,),
            metrics=candidate.metrics,
            over_best=_ratio_of_candidates(candidate, best),
        )
        for candidate in candidates
    ]


def _ratio_of_candidates(candidate: Candidate, best: Candidate) -> StepTimeRatio:
    drift = best.factor / candidate.factor
    return StepTimeRatio(
        value=candidate.step_time_ms / best.step_time_ms,
        low=candidate.metrics.step_time_low_ms * drift / best.metrics.step_time_high_ms,
        high=candidate.metrics.step_time_high_ms * drift / best.metrics.step_time_low_ms,
    )


def rank_finalists(finals: Mapping[Layout, Sequence[FinishedTrial]]) -> list[Standing]:
    """Return the standings of the finalists, fastest first.

    Args:
        finals: the completed finals of each layout, at least one per layout.
    """
    steps_ms = [[measured_metrics(run).step_times_ms for run in runs] for runs in finals.values()]
    logs, errors = pooled_log_times(steps_ms)
    best = int(logs.argmin())
    standings = []
    for place, (layout, runs) in enumerate(finals.items()):
        arms = np.quantile(errors[place] - errors[best], TAILS) if place != best else np.zeros(2)
        log_ratio = logs[place] - logs[best]
        low, high = np.exp(log_ratio + arms)
        ratio = StepTimeRatio(value=float(np.exp(log_ratio)), low=float(low), high=float(high))
        interval_ms = np.exp(logs[place] + np.quantile(errors[place], TAILS))
        metrics = _pooled_metrics(runs, float(np.exp(logs[place])), *interval_ms.tolist())
        standings.append(Standing(layout=layout, runs=tuple(runs), metrics=metrics, over_best=ratio))
    return sorted(standings, key=lambda standing: (standing.over_best.value, standing.trial.number))


def _pooled_metrics(
    runs: Sequence[FinishedTrial], step_ms: float, step_low_ms: float, step_high_ms: float
) -> Metrics:
    """Return the metrics of several runs of one layout.

    Steps are concatenated, rates follow the pooled step time, peaks are the largest, and all else is the middle run's.
    """
    middle, run_metrics = measured_metrics(middle_run(runs)), [measured_metrics(run) for run in runs]
    faster = middle.step_time_ms / step_ms
    first_steps = np.cumsum([0, *(len(metrics.step_times_ms) for metrics in run_metrics)]).tolist()
    return replace(
        middle,
        step_times_ms=tuple(ms for metrics in run_metrics for ms in metrics.step_times_ms),
        outliers=tuple(
            first_step + outlier
            for first_step, metrics in zip(first_steps, run_metrics, strict=False)
            for outlier in metrics.outliers
        ),
        step_time_ms=step_ms,
        step_time_low_ms=step_low_ms,
        step_time_high_ms=step_high_ms,
        tokens_per_s_per_gpu=middle.tokens_per_s_per_gpu * faster,
        model_tflops_per_s_per_gpu=middle.model_tflops_per_s_per_gpu * faster,
        mfu=None if middle.mfu is None else middle.mfu * faster,
        peak_allocated_gib=max(metrics.peak_allocated_gib for metrics in run_metrics),
        peak_reserved_gib=max(
            (metrics.peak_reserved_gib for metrics in run_metrics if metrics.peak_reserved_gib), default=None
        ),
    )
