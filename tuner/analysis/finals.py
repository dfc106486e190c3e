"""The finals: the fastest layouts and the baseline run again, interleaved; and what runs again before them. Pure.

Everything follows from the finished trials, so a sweep that is resumed goes on with its finals by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from tuner.analysis.answer import baseline_layout, candidates, finals_of, ruled_out
from tuner.analysis.drift import drift
from tuner.core.layout import Layout
from tuner.trial.contract import Outcome
from tuner.trial.finished import SEARCHED, FinishedTrial

FEWEST_RUNS: Final = 2
"""Of one layout: a single run says nothing of how runs differ."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How large the finals are."""

    finalists: int
    """Layouts beside the baseline."""
    runs: int
    """Of each, the baseline's too."""

    @property
    def trials(self) -> int:
        """All of them, where a baseline completed."""
        return (self.finalists + 1) * self.runs if self.finalists else 0

    def smaller(self) -> "Plan":
        """The next smaller finals: fewer finalists, then fewer runs, then none."""
        if self.finalists > 1:
            return Plan(self.finalists - 1, self.runs)
        return Plan(1, self.runs - 1) if self.runs > FEWEST_RUNS else Plan(0, 0)


def fitting(wanted: Plan, finalists: int, trials: float, seconds: float, trial_s: float) -> Plan:
    """The largest finals that fit.

    Args:
        wanted: what the sweep asks for.
        finalists: layouts that there are for it, beside the baseline.
        trials: that may still run.
        seconds: that they may take.
        trial_s: what one of them is expected to take.
    """
    plan = Plan(min(wanted.finalists, finalists), wanted.runs) if finalists and wanted.runs else Plan(0, 0)
    while plan.trials and (plan.trials > trials or plan.trials * trial_s > seconds):
        plan = plan.smaller()
    return plan


def standing_for_finals(rows: Sequence[FinishedTrial]) -> list[Layout]:
    """The layouts that may come into the finals, the fastest first, the baseline left out."""
    rows = sorted(rows, key=lambda row: row.number)
    start = baseline_layout(rows)
    found = candidates(rows, drift(rows), ruled_out(rows))
    return [one.row.layout for one in found if one.row.layout != start]


def next_final(rows: Sequence[FinishedTrial], plan: Plan) -> Layout | None:
    """The layout that runs next in the finals; None once they are through, or where there is nothing to compare.

    Round by round, the fastest first and the baseline last, and every other round the other way, so that a drift
    of the machine favours none.
    """
    rows = sorted(rows, key=lambda row: row.number)
    finalists = standing_for_finals(rows)[: plan.finalists]
    out, start = ruled_out(rows), baseline_layout(rows)
    ran = [row.layout for row in finals_of(rows)]
    if start is not None and start not in out and _completed(rows, start):
        finalists.append(start)
    if len(finalists) < 2 or not plan.runs:
        return None
    counts = [ran.count(layout) for layout in finalists]
    fewest = min(counts)
    if fewest >= plan.runs:
        return None
    ordered = finalists if fewest % 2 == 0 else finalists[::-1]
    return next(layout for layout in ordered if ran.count(layout) == fewest)


def _completed(rows: Sequence[FinishedTrial], layout: Layout) -> bool:
    return any(row.layout == layout and row.result.metrics is not None for row in rows)


def to_repeat(rows: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """The trials of the search that the machine disturbed and that were not measured again yet, the fastest first."""
    again = {row.layout for row in rows if row.source == "repeat"}
    found = [
        (metrics.step_time_ms if metrics else row.result.slower_than_ms or 0.0, row.number, row)
        for row in rows
        if row.source in SEARCHED
        and row.result.suspicions
        and row.layout not in again
        and ((metrics := row.result.metrics) is not None or row.result.outcome is Outcome.TOO_SLOW)
    ]
    return [row for _, _, row in sorted(found, key=lambda one: one[:2])]


def expected_s(rows: Sequence[FinishedTrial], layouts: Sequence[Layout] = ()) -> float:
    """What the next trial, of one of these layouts, is expected to take: the longest of their medians.

    Of a layout that never completed, and without one, the median of all completed trials; 0 before the first.
    """
    every = [row.result.durations.total_s for row in rows if row.result.metrics is not None]
    usual = median(every) if every else 0.0
    found = [usual] if not layouts else []
    for layout in layouts:
        own = [
            row.result.durations.total_s
            for row in rows
            if row.layout == layout and row.result.metrics is not None
        ]
        found.append(median(own) if own else usual)
    return max(found)
