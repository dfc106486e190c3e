"""How the machine's speed drifted over a sweep, from the runs of one layout repeated through it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

from tuner.core.layout import Layout
from tuner.trial.finished import SEARCHED, FinishedTrial

FEWEST: Final = 3
"""Runs from which a straight line has an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """A straight line through the logarithm of one layout's step times, over the clock."""

    runs: int
    began_s: float
    """When the first of them ended, in seconds since the epoch; likewise the last."""
    ended_s: float
    change: float
    """From the first to the last: 0.03 where a step came to take 3% longer."""
    change_low: float
    """Lower end of the 95% interval: least squares, Student's t with runs - 2 degrees of freedom."""
    change_high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out that nothing changed."""
        return not self.change_low <= 0 <= self.change_high

    def factor(self, row: FinishedTrial) -> float:
        """How much longer a step took when this trial ran than at the first run; 1 where no drift is shown.

        The line is not followed beyond its runs.
        """
        at_s = ended_s(row)
        if at_s is None or not self.is_significant:
            return 1.0
        share = (at_s - self.began_s) / (self.ended_s - self.began_s)
        return float((1 + self.change) ** min(max(share, 0.0), 1.0))

    def sentence(self) -> str:
        """What a user may believe of the machine."""
        hours = (self.ended_s - self.began_s) / 3600
        told = (
            f"{self.change:+.1%} step time over {hours:.2g} h (95% interval {self.change_low:+.1%} to "
            f"{self.change_high:+.1%}, {self.runs} runs of the baseline)"
        )
        if self.is_significant:
            return f"The machine drifted: {told}; the search's ranking is corrected for it."
        return f"No drift of the machine is shown: {told}."


def drift(rows: Sequence[FinishedTrial]) -> Drift | None:
    """The drift that the baseline's first run and its canaries show; None of fewer than three at different times.

    Runs on a disturbed machine say nothing of the undisturbed one and are left out.
    """
    points = sorted(
        (at_s, metrics.step_time_ms)
        for row in rows
        if row.source in ("baseline", "canary")
        and (metrics := row.result.metrics) is not None
        and not row.result.suspicions
        and (at_s := ended_s(row)) is not None
    )
    if len(points) < FEWEST or points[0][0] == points[-1][0]:
        return None
    seconds, steps_ms = np.array(points).T
    share, logs = (seconds - seconds[0]) / (seconds[-1] - seconds[0]), np.log(steps_ms)
    centred = share - share.mean()
    slope = float(centred @ logs / (centred @ centred))
    errors = logs - logs.mean() - slope * centred
    freedom = len(points) - 2
    deviation = float(np.sqrt(errors @ errors / freedom / (centred @ centred)))
    arm = float(stdtrit(freedom, 0.975)) * deviation
    return Drift(
        runs=len(points),
        began_s=float(seconds[0]),
        ended_s=float(seconds[-1]),
        change=float(np.expm1(slope)),
        change_low=float(np.expm1(slope - arm)),
        change_high=float(np.expm1(slope + arm)),
    )


def ended_s(row: FinishedTrial) -> float | None:
    """When a trial ended, in seconds since the epoch; None where it is not recorded."""
    return datetime.fromisoformat(row.result.finished_at).timestamp() if row.result.finished_at else None


def canary_due(rows: Sequence[FinishedTrial], every: int | None) -> Layout | None:
    """The baseline's layout, where `every` trials of the search have ended since its last run and it ever completed."""
    baseline = next(
        (row.layout for row in rows if row.source == "baseline" and row.result.metrics is not None), None
    )
    if every is None or baseline is None:
        return None
    last = max(row.number for row in rows if row.source in ("baseline", "canary"))
    since = sum(row.number > last and row.source in SEARCHED for row in rows)
    return baseline if since >= every else None
