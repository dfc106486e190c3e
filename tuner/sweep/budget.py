"""Keeps account of the budget of a sweep: what is used, what the finals need, and when the sweep stops. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import Final

from tuner.analysis.finals import (
    FinalsPlan,
    eligible_finalists,
    expected_trial_s,
    fitting_plan,
    next_final,
    trials_to_repeat,
)
from tuner.analysis.runs import finals_of
from tuner.sweep.configuration import Budget
from tuner.sweep.state import FAILURES_TO_STOP
from tuner.trial.finished import FinishedTrial

LARGEST_SHARE: Final = 0.5
"""The largest share of any limit that is kept for the finals and the repeats before them. Assumed: without a search
before them, finals have nothing to compare.
"""


class Stop(Enum):
    """The reason why a sweep ended."""

    EXHAUSTED = "every layout is measured or ruled out"
    CONVERGED = "no layout left is likely to be worth more (budget.min_gain)"
    TRIALS = "the budget of trials is used"
    HOURS = "the budget of hours is used"
    GPU_HOURS = "the budget of GPU-hours is used"
    DEADLINE = "the deadline leaves no time for another trial"
    INTERRUPTED = "interrupted"
    BREAKER = f"{FAILURES_TO_STOP} infrastructure failures in a row"


def is_finished(reason: Stop) -> bool:
    """Whether a sweep that stopped for this reason is complete; False if it was cut off and should be resumed."""
    return reason not in (Stop.INTERRUPTED, Stop.BREAKER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """The time by which the sweep must end, and the time now; all times are seconds since the epoch."""

    began_s: float
    """When this tuner began or resumed the sweep."""
    now_s: float
    deadline_s: float

    @property
    def left_s(self) -> float:
        """Seconds from now to the deadline; negative if it has passed."""
        return self.deadline_s - self.now_s

    @property
    def whole_s(self) -> float:
        """Seconds from `began_s` to the deadline; 0 if it had passed by then."""
        return max(0.0, self.deadline_s - self.began_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """The account of a sweep: its budget, and the trials and the time that it has used."""

    budget: Budget
    world_size: int
    """GPUs of the cluster, all of which a trial uses."""
    trials: tuple[FinishedTrial, ...]
    """The finished trials, by number."""
    lost_s: float
    """Wall clock in seconds of attempts that left no finished trial; it counts as used."""
    running: int = 0
    """Trials in flight. Each counts as used, with the wall clock that a trial is expected to take."""
    deadline: Deadline | None
    """The deadline of the sweep; None if it has none."""

    @property
    def used_s(self) -> float:
        """Wall clock in seconds used so far: that of all ended attempts, and the expected one of trials in flight."""
        return self.finished_s + (self.running * expected_trial_s(self.trials) if self.running else 0.0)

    @property
    def finished_s(self) -> float:
        """Wall clock in seconds of all ended attempts together."""
        return self.lost_s + _wall_clock_s(self.trials)

    @property
    def used_trials(self) -> int:
        """Number of trials that are finished or in flight."""
        return len(self.trials) + self.running

    @property
    def finals(self) -> list[FinishedTrial]:
        """The finished trials of the current finals."""
        return finals_of(self.trials)

    @property
    def before_finals(self) -> "Ledger":
        """The ledger without the finals; its deadline is unchanged."""
        return replace(self, trials=self.trials[: len(self.trials) - len(self.finals)])

    @property
    def wanted(self) -> FinalsPlan:
        """The finals that the budget asks for."""
        runs = self.budget.final_runs
        return FinalsPlan(self.budget.finalists, runs) if self.budget.finalists else FinalsPlan(0, 0)

    def time_limits_s(self) -> dict[Stop, float]:
        """Return the wall clock in seconds that all trials together may take, per limit of the budget."""
        limits_s: dict[Stop, float] = {}
        if self.budget.hours is not None:
            limits_s[Stop.HOURS] = self.budget.hours * 3600
        if self.budget.gpu_hours is not None:
            limits_s[Stop.GPU_HOURS] = self.budget.gpu_hours * 3600 / self.world_size
        return limits_s

    def left_s(self) -> float | None:
        """Return the seconds until the first time limit is reached; None if there is no time limit."""
        left = [limit_s - self.used_s for limit_s in self.time_limits_s().values()]
        left += [self.deadline.left_s] if self.deadline else []
        return max(0.0, min(left)) if left else None

    def used_up(self, next_s: float) -> Stop | None:
        """Return why no further trial may begin; None if one may.

        Args:
            next_s: how many seconds the next trial is expected to take.
        """
        if self.used_trials >= self.budget.trials:
            return Stop.TRIALS
        for reason, limit_s in self.time_limits_s().items():
            if self.used_s >= limit_s:
                return reason
        return Stop.DEADLINE if self.deadline and next_s > self.deadline.left_s else None

    def reserve(self) -> int:
        """Return how many trials are kept for the finals and for the repeats before them."""
        limits_s = [*self.time_limits_s().values(), *([self.deadline.whole_s] if self.deadline else [])]
        share, share_s = self.budget.trials * LARGEST_SHARE, min(limits_s, default=inf) * LARGEST_SHARE
        trial_s = expected_trial_s(self.trials)
        finals = fitting_plan(self.wanted, self.wanted.finalists, share, share_s, trial_s).trials
        repeats = len(trials_to_repeat(self.trials)) if finals else 0
        return int(min(finals + repeats, share, share_s / trial_s if trial_s else inf))

    def search_is_over(self, share: float = 1.0) -> Stop | None:
        """Return why the search must end for the finals to fit; None if it goes on.

        Only the trials before the finals count. Under a deadline, finals that have begun and are not complete mean that
        the deadline ended the search.

        Args:
            share: the share of the search's part of the budget that may be used; it is below 1 for the grid.
        """
        before, reserve = self.before_finals, self.before_finals.reserve()
        if before.used_trials >= share * (self.budget.trials - reserve):
            return Stop.TRIALS
        trial_s = expected_trial_s(before.trials)
        for reason, limit_s in self.time_limits_s().items():
            if before.used_s >= share * (limit_s - reserve * trial_s):
                return reason
        if self.deadline is None:
            return None
        if self.finals and next_final(self.trials, self.plan()) is not None:
            return Stop.DEADLINE
        later_s = (1 - share) * (self.deadline.whole_s - reserve * trial_s)
        return Stop.DEADLINE if (1 + reserve) * trial_s > self.deadline.left_s - later_s else None

    def plan(self, more: int = 0) -> FinalsPlan:
        """Return the finals that fit into the part of the budget that the search leaves.

        Args:
            more: how many further trials of the search, or repeats, run before the finals.
        """
        before, layouts = self.before_finals, eligible_finalists(self.trials)
        final_s = expected_trial_s(self.trials, layouts[: self.wanted.finalists])
        left_s = [limit_s - before.used_s for limit_s in self.time_limits_s().values()]
        left_s += [self.deadline.left_s + _wall_clock_s(self.finals)] if self.deadline else []
        return fitting_plan(
            self.wanted,
            len(layouts),
            self.budget.trials - before.used_trials - more,
            min(left_s, default=inf) - more * expected_trial_s(self.trials),
            final_s,
        )

    def next_repeat(self) -> FinishedTrial | None:
        """Return the disturbed trial to measure again next; None if there is none, or if it would shrink the finals."""
        disturbed = trials_to_repeat(self.trials)
        if not disturbed or self.finals or not self.wanted.finalists:
            return None
        return disturbed[0] if self.plan(more=1) == self.plan() else None


def _wall_clock_s(trials: Sequence[FinishedTrial]) -> float:
    return sum(trial.result.durations.total_s for trial in trials)


def shrunk(wanted: FinalsPlan, plan: FinalsPlan, finalists: int) -> str | None:
    """Return the sentence that says that the finals are smaller than wanted; None if they are not.

    Args:
        wanted: the finals that the budget asks for.
        plan: the finals that fit.
        finalists: how many layouts may run in them, besides the baseline.
    """
    full = FinalsPlan(min(wanted.finalists, finalists), wanted.runs)
    if plan == full or not wanted.finalists or not finalists:
        return None
    asked = f"{full.finalists} finalists and the baseline {full.runs} times each do not fit into the budget"
    if not plan.finalists:
        return f"No finals: {asked}, nor do fewer."
    return f"Smaller finals: {asked}; {plan.finalists} and the baseline run {plan.runs} times each."
