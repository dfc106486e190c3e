"""Ranks layouts by step time: from one measurement each before the finals, from all their runs in the finals after."""

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
    """The step time of one layout divided by that of another, with an interval of the ratio."""

    value: float
    low: float
    """The lower end of the ratio's interval."""
    high: float
    """The upper end of the ratio's interval."""

    @property
    def is_tie(self) -> bool:
        """Whether the interval includes 1, so that noise hides which of the two layouts is faster."""
        return self.low <= 1 <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One layout in a ranking, with the measurements that count for it."""

    layout: Layout
    runs: tuple[FinishedTrial, ...]
    """The runs that count for the layout: its finals, or before the finals its one measurement in the search."""
    metrics: Metrics
    """The metrics of these runs, pooled."""
    over_best: StepTimeRatio
    """The layout's step time divided by the best layout's.

    After the finals, it has a 95% interval. Before them, it is corrected for the machine's drift, and its interval is
    wider: from the lower end of this layout's 95% interval divided by the upper end of the best's, to the upper end of
    this layout's divided by the lower end of the best's.
    """

    @property
    def trial(self) -> FinishedTrial:
        """The run with the median step time, which represents the layout."""
        return middle_run(self.runs)


def rank_candidates(candidates: Sequence[Candidate]) -> list[Standing]:
    """Return the standings of the layouts that the search measured, in the order of `candidates`: fastest first."""
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
        finals: the completed finals by layout, at least one per layout.
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
    """Return the metrics of several runs of one layout, pooled.

    The timed steps are concatenated, throughputs are scaled to the pooled step time `step_ms`, peaks of memory are the
    largest of any run, and everything else is taken from the run with the median step time.
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
