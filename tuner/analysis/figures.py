"""Compares the measurements of the best layout, or of one trial, with the fastest other layout and the baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tuner.analysis.answer import Answer, answer, counting_finals
from tuner.analysis.candidates import candidates, ruled_out
from tuner.analysis.drift import drift
from tuner.analysis.standings import Standing
from tuner.trial.contract import Metrics
from tuner.trial.finished import FinishedTrial


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimeComparison:
    """A comparison of a layout with another layout by their step times."""

    trial: int
    """The number of the trial that represents the other layout."""
    label: str
    """The other layout's label."""
    ratio: float
    """The other layout's step time divided by the layout's own; above 1 if the layout is faster than the other."""
    ratio_low: float
    """The lower end of the ratio's interval.

    It is a 95% interval if both layouts ran in the finals. Otherwise it is wider: from the lower end of the other's 95%
    interval divided by the upper end of the layout's own, to the upper end of the other's divided by the lower end of
    the layout's own.
    """
    ratio_high: float
    """The upper end of the ratio's interval."""

    @property
    def is_tie(self) -> bool:
        """Whether the interval includes 1, so that noise hides which of the two layouts is faster."""
        return self.ratio_low <= 1 <= self.ratio_high


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The measurements of one layout, and its comparisons with other layouts."""

    trial: int
    """The number of the trial that represents the layout."""
    metrics: Metrics
    """The layout's measurements, pooled over its finals if it ran in them."""
    rival: StepTimeComparison | None
    """The comparison with the fastest other layout; None if no other layout completed."""
    baseline: StepTimeComparison | None
    """The comparison with the baseline; None if the baseline did not complete."""
    versions: Mapping[str, str]
    """The versions of packages and driver with which the trial ran, by name."""
    device_name: str
    """The model name of the GPU or CPU on which the trial ran."""
    final_runs: int = 0
    """The number of finals over which `metrics` is pooled; 0 if it is one measurement."""

    def gain_sentence(self) -> str:
        """Return a sentence that states the gain over the baseline and the interval of the gain."""
        start = self.baseline
        if start is None:
            return "No baseline completed: the gain is unknown."
        if start.trial == self.trial:
            return "This is the baseline itself."
        interval = f"{start.ratio_low:.3f}x to {start.ratio_high:.3f}x"
        interval = (
            f"95% interval {interval}" if self.final_runs else f"{interval} by the ends of both 95% intervals"
        )
        noise = "; within noise" if start.is_tie else ""
        gain = f"{start.ratio:.3f}x the throughput of the baseline"
        return f"{gain}, t{start.trial:04d} {start.label} ({interval}{noise})."

    def certainty_sentence(self) -> str:
        """Return a sentence that states the number of timed steps, and how clearly the fastest other layout differs."""
        steps = f"{len(self.metrics.step_times_ms)} timed steps"
        if self.final_runs:
            steps += f" in {self.final_runs} interleaved runs"
        if self.rival is None:
            return f"{steps}; no other layout completed, so there is nothing to compare with."
        rival = self.rival
        other = f"the fastest other layout, t{rival.trial:04d} {rival.label}"
        if rival.is_tie:
            clarity = f"tie within {max(rival.ratio_high - 1, 1 - rival.ratio_low):.1%}"
        else:
            clarity = f"clear, by {rival.ratio_low - 1:.1%} at least"
        return f"{steps}; {other}, differs by {rival.ratio - 1:+.1%} in step time: {clarity}."


def best_trial(trials: Iterable[FinishedTrial]) -> FinishedTrial | None:
    """Return the trial that represents the fastest layout; None if no layout was measured that can win.

    It is the layout's final with the median step time, or before the finals the trial that measured the layout.
    """
    trials = sorted(trials, key=lambda trial: trial.number)
    out = ruled_out(trials)
    if counting_finals(trials, out):
        ranked = answer(trials)
        return ranked.best.trial if ranked else None
    # A sweep calls this after each trial. Ranking the other layouts, as `answer` does, would take most of the time.
    fastest = candidates(trials, drift(trials), out)
    return fastest[0].trial if fastest else None


def tied_trials(trials: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """Return the trials that represent the layouts which do not differ from the best by more than noise.

    The trial of the best layout itself comes first.
    """
    ranked = answer(trials)
    return [standing.trial for standing in ranked.tied] if ranked else []


def figures(trials: Sequence[FinishedTrial], number: int | None = None) -> Figures | None:
    """Return the figures of the best layout, or of the one trial with a given number; None if it has no measurement.

    Args:
        trials: the finished trials of a sweep.
        number: the number of the trial; None takes the best layout.
    """
    ranked = answer(trials)
    if number is not None:
        trial = next((trial for trial in trials if trial.number == number), None)
        return _figures_of_trial(trial, ranked) if trial else None
    if ranked is None:
        return None
    best, rival = ranked.best, ranked.ranking[1] if len(ranked.ranking) > 1 else None
    return Figures(
        trial=best.trial.number,
        metrics=best.metrics,
        rival=_over_best(rival) if rival else None,
        baseline=_over_best(ranked.baseline) if ranked.baseline else None,
        versions=best.trial.result.versions,
        device_name=best.trial.result.device_name,
        final_runs=len(best.runs) if ranked.is_final else 0,
    )


def _over_best(other: Standing) -> StepTimeComparison:
    return StepTimeComparison(
        trial=other.trial.number,
        label=other.layout.label(),
        ratio=other.over_best.value,
        ratio_low=other.over_best.low,
        ratio_high=other.over_best.high,
    )


def _figures_of_trial(trial: FinishedTrial, ranked: Answer | None) -> Figures | None:
    """Return the figures of one trial, compared with the standings in an answer; None if the trial did not complete."""
    metrics = trial.result.metrics
    if metrics is None:
        return None
    others = [standing for standing in ranked.ranking if standing.layout != trial.layout] if ranked else []
    start = ranked.baseline if ranked else None
    return Figures(
        trial=trial.number,
        metrics=metrics,
        rival=_over_metrics(others[0], metrics) if others else None,
        baseline=_over_metrics(start, metrics) if start else None,
        versions=trial.result.versions,
        device_name=trial.result.device_name,
    )


def _over_metrics(other: Standing, ours: Metrics) -> StepTimeComparison:
    """Compare another layout's standing with the metrics of one trial, `ours`, by the ends of both 95% intervals."""
    return StepTimeComparison(
        trial=other.trial.number,
        label=other.layout.label(),
        ratio=other.metrics.step_time_ms / ours.step_time_ms,
        ratio_low=other.metrics.step_time_low_ms / ours.step_time_high_ms,
        ratio_high=other.metrics.step_time_high_ms / ours.step_time_low_ms,
    )
