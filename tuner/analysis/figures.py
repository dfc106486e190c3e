"""The measured facts of the best layout, beside its rival and the baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.analysis.answer import Answer, Standing, answer
from tuner.trial.contract import Metrics
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Another trial against ours: its step time over ours, above 1 where ours is faster."""

    trial: int
    label: str
    ratio: float
    ratio_low: float
    """Lower end of its 95% interval; without finals from the near ends of both step times' intervals, so wider."""
    ratio_high: float

    @property
    def is_tie(self) -> bool:
        """Whether noise cannot tell the two apart."""
        return self.ratio_low <= 1 <= self.ratio_high


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured of the exported layout, and how sure it is."""

    trial: int
    metrics: Metrics
    rival: Comparison | None
    """The fastest trial of another layout; None where no other completed."""
    baseline: Comparison | None
    """None where no baseline completed."""
    versions: Mapping[str, str]
    device_name: str
    final_runs: int = 0
    """Runs in the finals that the metrics hold together; 0 where they are one measurement of the search."""

    def gain_sentence(self) -> str:
        """The gain over the baseline, with its noise."""
        start = self.baseline
        if start is None:
            return "No baseline completed: the gain is unknown."
        if start.trial == self.trial:
            return "This is the baseline itself."
        noise = "; within noise" if start.is_tie else ""
        between = f"{start.ratio_low:.3f}x to {start.ratio_high:.3f}x"
        interval = (
            f"95% interval {between}" if self.final_runs else f"{between} by the ends of both 95% intervals"
        )
        return (
            f"{start.ratio:.3f}x the throughput of the baseline, t{start.trial:04d} {start.label} "
            f"({interval}{noise})."
        )

    def certainty_sentence(self) -> str:
        """How sure the ranking is."""
        steps = f"{len(self.metrics.step_times_ms)} timed steps"
        if self.final_runs:
            steps += f" in {self.final_runs} interleaved runs"
        if self.rival is None:
            return f"{steps}; no other layout completed, so there is nothing to compare with."
        rival = self.rival
        other = f"the fastest other layout, t{rival.trial:04d} {rival.label}"
        if rival.is_tie:
            verdict = f"tie within {max(rival.ratio_high - 1, 1 - rival.ratio_low):.1%}"
        else:
            verdict = f"clear, by {rival.ratio_low - 1:.1%} at least"
        return f"{steps}; {other}, differs by {rival.ratio - 1:+.1%} in step time: {verdict}."


def best(rows: Iterable[FinishedTrial]) -> FinishedTrial | None:
    """The trial that stands for the fastest layout: its final in the middle, before finals its one measurement."""
    found = answer(tuple(rows))
    return found.best.row if found else None


def tie(rows: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """The trials of the layouts that noise cannot tell from the best, itself included, fastest first."""
    found = answer(rows)
    return [standing.row for standing in found.tied] if found else []


def figures(rows: Sequence[FinishedTrial], number: int | None = None) -> Figures | None:
    """The measured facts of the best layout, or of one trial alone, beside its rival and the baseline.

    Returns None where nothing completed, or that trial did not. The rival is the fastest other layout.
    """
    found = answer(rows)
    if number is not None:
        row = next((row for row in rows if row.number == number), None)
        return _figures_of_trial(row, found) if row else None
    if found is None:
        return None
    rival = found.ranking[1] if len(found.ranking) > 1 else None
    return Figures(
        trial=found.best.row.number,
        metrics=found.best.metrics,
        rival=_compared(rival) if rival else None,
        baseline=_compared(found.baseline) if found.baseline else None,
        versions=found.best.row.result.versions,
        device_name=found.best.row.result.device_name,
        final_runs=len(found.best.runs) if found.is_final else 0,
    )


def _compared(other: Standing) -> Comparison:
    return Comparison(
        trial=other.row.number,
        label=other.layout.label(),
        ratio=other.over_best.value,
        ratio_low=other.over_best.low,
        ratio_high=other.over_best.high,
    )


def _figures_of_trial(row: FinishedTrial, found: Answer | None) -> Figures | None:
    """One trial as it measured, beside the answer's standings by the ends of their intervals."""
    metrics = row.result.metrics
    if metrics is None:
        return None
    others = [one for one in found.ranking if one.layout != row.layout] if found else []
    start = found.baseline if found else None
    return Figures(
        trial=row.number,
        metrics=metrics,
        rival=_beside(others[0], metrics) if others else None,
        baseline=_beside(start, metrics) if start else None,
        versions=row.result.versions,
        device_name=row.result.device_name,
    )


def _beside(other: Standing, ours: Metrics) -> Comparison:
    theirs = other.metrics
    return Comparison(
        trial=other.row.number,
        label=other.layout.label(),
        ratio=theirs.step_time_ms / ours.step_time_ms,
        ratio_low=theirs.step_time_low_ms / ours.step_time_high_ms,
        ratio_high=theirs.step_time_high_ms / ours.step_time_low_ms,
    )
