"""Estimates from repeated runs of the baseline how the machine's speed drifted during a sweep; says when to run one."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np

from tuner.core.layout import Layout
from tuner.trial.finished import SEARCHED, FinishedTrial

FEWEST_RUNS_FOR_DRIFT: Final = 3
"""The fewest runs from which a drift is estimated: the error of a straight line through two points is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """The change of the machine's speed during a sweep: a straight line through log(step time) of the baseline's runs
    over time, fitted by least squares."""

    runs: int
    """The number of runs to which the line is fitted."""
    began_s: float
    """When the first of these runs ended, in seconds since the epoch."""
    ended_s: float
    """When the last of these runs ended, in seconds since the epoch."""
    change: float
    """The relative change of the step time from the first run to the last; 0.03 means that a step takes 3% longer."""
    change_low: float
    """The lower end of the change's 95% interval (Student's t with runs - 2 degrees of freedom)."""
    change_high: float
    """The upper end of the change's 95% interval."""

    @property
    def is_significant(self) -> bool:
        """Whether the 95% interval of the change excludes 0, so that the machine has drifted."""
        return not self.change_low <= 0 <= self.change_high

    def factor(self, trial: FinishedTrial) -> float:
        """Return the duration of a step at the time of a trial, divided by its duration at the first run.

        It is 1 if the drift is not significant. A trial before the first run gets the value at the first run, and a
        trial after the last run the value at the last run.
        """
        at_s = ended_s(trial)
        if at_s is None or not self.is_significant:
            return 1.0
        share = (at_s - self.began_s) / (self.ended_s - self.began_s)
        return float((1 + self.change) ** min(max(share, 0.0), 1.0))

    def sentence(self) -> str:
        """Return a sentence for the user that says whether and by how much the machine drifted."""
        hours = (self.ended_s - self.began_s) / 3600
        change = (
            f"{self.change:+.1%} step time over {hours:.2g} h (95% interval {self.change_low:+.1%} to "
            f"{self.change_high:+.1%}, {self.runs} runs of the baseline)"
        )
        if self.is_significant:
            return f"The machine drifted: {change}; the search's ranking is corrected for it."
        return f"No drift of the machine is shown: {change}."


def drift(trials: Sequence[FinishedTrial]) -> Drift | None:
    """Return the drift estimated from the baseline's first run and its canaries.

    Disturbed runs are left out, since they do not show the speed of the undisturbed machine. The result is None if
    fewer than three runs remain.
    """
    points = sorted(
        (at_s, metrics.step_time_ms)
        for trial in trials
        if trial.source in ("baseline", "canary")
        and (metrics := trial.result.metrics) is not None
        and not trial.result.suspicions
        and (at_s := ended_s(trial)) is not None
    )
    if len(points) < FEWEST_RUNS_FOR_DRIFT or points[0][0] == points[-1][0]:
        return None
    from scipy.special import stdtrit  # type: ignore[import-untyped]

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


def ended_s(trial: FinishedTrial) -> float | None:
    """Return when a trial ended, in seconds since the epoch; None if that is not recorded."""
    finished_at = trial.result.finished_at
    return datetime.fromisoformat(finished_at).timestamp() if finished_at else None


def canary_due(trials: Sequence[FinishedTrial], every: int | None) -> Layout | None:
    """Return the layout to run as a canary now, which is the baseline's; None if no canary is due.

    A canary is due once `every` trials of the search have ended since the baseline or a canary last ran.

    Args:
        trials: the finished trials of a sweep.
        every: the number of trials of the search between two canaries; None means that canaries are never due.
    """
    baseline = next(
        (trial.layout for trial in trials if trial.source == "baseline" and trial.result.metrics is not None),
        None,
    )
    if every is None or baseline is None:
        return None
    last = max(trial.number for trial in trials if trial.source in ("baseline", "canary"))
    since = sum(trial.number > last and trial.source in SEARCHED for trial in trials)
    return baseline if since >= every else None
