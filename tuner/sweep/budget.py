"""When a sweep ends: what it may use, what it keeps for its finals, and why it stops. Pure."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, time, timedelta
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
from tuner.errors import InputError
from tuner.sweep.configuration import Budget
from tuner.sweep.state import FAILURES_TO_STOP
from tuner.trial.finished import FinishedTrial

LARGEST_SHARE: Final = 0.5
"""Of any budget, for the finals and what is measured again before them: a search must come first."""


class Stop(Enum):
    """Why a sweep ended."""

    EXHAUSTED = "every layout is measured or ruled out"
    CONVERGED = "no layout left is likely to be worth more (budget.min_gain)"
    TRIALS = "the budget of trials is used"
    HOURS = "the budget of hours is used"
    GPU_HOURS = "the budget of GPU-hours is used"
    DEADLINE = "the deadline leaves no time for another trial"
    INTERRUPTED = "interrupted"
    BREAKER = f"{FAILURES_TO_STOP} infrastructure failures in a row"


def is_finished(reason: Stop) -> bool:
    """Whether a sweep that ended so came to its end, and was not cut off."""
    return reason not in (Stop.INTERRUPTED, Stop.BREAKER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Where the night stands, in seconds since the epoch."""

    began_s: float
    """When this run of the sweep began."""
    now_s: float
    deadline_s: float

    @property
    def left_s(self) -> float:
        """Until the deadline."""
        return self.deadline_s - self.now_s

    @property
    def whole_s(self) -> float:
        """From this run's begin to the deadline."""
        return self.deadline_s - self.began_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What a sweep may use and has used."""

    budget: Budget
    world_size: int
    rows: tuple[FinishedTrial, ...]
    """The finished trials, by number."""
    lost_s: float
    """Wall clock of attempts that came to nothing; it is used too."""
    running: int = 0
    """Trials in flight. They count as used, each with the wall clock that a trial is expected to take."""
    clock: Clock | None
    """None without a deadline."""

    @property
    def used_s(self) -> float:
        """Wall clock of all trials, every attempt included; of those in flight what a trial is expected to take."""
        return self.finished_s + (self.running * expected_trial_s(self.rows) if self.running else 0.0)

    @property
    def finished_s(self) -> float:
        """Wall clock of all trials that have ended, every attempt included."""
        return self.lost_s + sum(row.result.durations.total_s for row in self.rows)

    @property
    def used_trials(self) -> int:
        """Trials that are finished or in flight."""
        return len(self.rows) + self.running

    @property
    def finals(self) -> list[FinishedTrial]:
        """The finals that count."""
        return finals_of(self.rows)

    @property
    def searched(self) -> "Ledger":
        """As it stood before the finals, but for the clock."""
        rows = self.rows[: len(self.rows) - len(self.finals)]
        return Ledger(
            budget=self.budget,
            world_size=self.world_size,
            rows=rows,
            lost_s=self.lost_s,
            running=self.running,
            clock=self.clock,
        )

    @property
    def wanted(self) -> FinalsPlan:
        """The finals that the sweep asks for."""
        runs = self.budget.final_runs
        return FinalsPlan(self.budget.finalists, runs) if self.budget.finalists else FinalsPlan(0, 0)

    def time_limits_s(self) -> dict[Stop, float]:
        """The wall clock that all trials together may take, by the budget that says so."""
        found: dict[Stop, float] = {}
        if self.budget.hours is not None:
            found[Stop.HOURS] = self.budget.hours * 3600
        if self.budget.gpu_hours is not None:
            found[Stop.GPU_HOURS] = self.budget.gpu_hours * 3600 / self.world_size
        return found

    def left_s(self) -> float | None:
        """What the budgets of time leave; None without one."""
        left = [limit_s - self.used_s for limit_s in self.time_limits_s().values()]
        left += [self.clock.left_s] if self.clock else []
        return max(0.0, min(left)) if left else None

    def used_up(self, next_s: float) -> Stop | None:
        """Why not even one more trial may begin, which is expected to take `next_s`; None where it may."""
        if self.used_trials >= self.budget.trials:
            return Stop.TRIALS
        for reason, limit_s in self.time_limits_s().items():
            if self.used_s >= limit_s:
                return reason
        return Stop.DEADLINE if self.clock and next_s > self.clock.left_s else None

    def reserve(self) -> int:
        """Trials kept for the finals and for what is measured again before them."""
        limits_s = [*self.time_limits_s().values(), *([self.clock.whole_s] if self.clock else [])]
        share, share_s = self.budget.trials * LARGEST_SHARE, min(limits_s, default=inf) * LARGEST_SHARE
        trial_s = expected_trial_s(self.rows)
        finals = fitting_plan(self.wanted, self.wanted.finalists, share, share_s, trial_s).trials
        again = len(trials_to_repeat(self.rows)) if finals else 0
        return int(min(finals + again, share, share_s / trial_s if trial_s else inf))

    def search_is_over(self, share: float = 1.0) -> Stop | None:
        """Why the search ends so that the finals still fit; None where it goes on.

        Judged by the trials before the finals. A deadline ended the search if finals that are not through follow it.

        Args:
            share: of what the search may use: less than 1 for the first of its stages.
        """
        before, reserve = self.searched, self.searched.reserve()
        if before.used_trials >= share * (self.budget.trials - reserve):
            return Stop.TRIALS
        trial_s = expected_trial_s(before.rows)
        for reason, limit_s in self.time_limits_s().items():
            if before.used_s >= share * (limit_s - reserve * trial_s):
                return reason
        if self.clock is None:
            return None
        if self.finals and next_final(self.rows, self.plan()) is not None:
            return Stop.DEADLINE
        later_s = (1 - share) * (self.clock.whole_s - reserve * trial_s)
        return Stop.DEADLINE if (1 + reserve) * trial_s > self.clock.left_s - later_s else None

    def plan(self, more: int = 0) -> FinalsPlan:
        """The finals that fit into what is left behind the search and `more` further trials."""
        before, layouts = self.searched, eligible_finalists(self.rows)
        wanted = self.wanted
        trial_s = expected_trial_s(self.rows, layouts[: wanted.finalists])
        seconds = min((limit_s - before.used_s for limit_s in self.time_limits_s().values()), default=inf)
        if self.clock:
            seconds = min(
                seconds, self.clock.left_s + sum(row.result.durations.total_s for row in self.finals)
            )
        left = self.budget.trials - before.used_trials
        return fitting_plan(
            wanted, len(layouts), left - more, seconds - more * expected_trial_s(self.rows), trial_s
        )

    def next_repeat(self) -> FinishedTrial | None:
        """The disturbed trial that is measured again next: while that makes the finals no smaller."""
        waiting = trials_to_repeat(self.rows)
        if not waiting or self.finals or not self.wanted.finalists:
            return None
        return waiting[0] if self.plan(more=1) == self.plan() else None


def shrunk(wanted: FinalsPlan, plan: FinalsPlan, finalists: int) -> str | None:
    """What to say where the finals are smaller than asked for; `finalists` layouts there were."""
    full = FinalsPlan(min(wanted.finalists, finalists), wanted.runs)
    if plan == full or not wanted.finalists or not finalists:
        return None
    asked = f"{full.finalists} finalists and the baseline {full.runs} times each do not fit into the budget"
    if not plan.finalists:
        return f"No finals: {asked}, nor do fewer."
    return f"Smaller finals: {asked}; {plan.finalists} and the baseline run {plan.runs} times each."


def deadline_of(text: str, now: datetime) -> datetime:
    """The next time this machine's clock shows `07:00`, or an ISO date and time; `now` and it in local time.

    Raises:
        InputError: if it is neither, or has passed.
    """
    with suppress(ValueError):
        clock = time.fromisoformat(text)
        if clock.tzinfo is None:
            today = datetime.combine(now.date(), clock)
            return today if today > now else today + timedelta(days=1)
    try:
        wanted = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"--deadline {text}: is neither a time of day as 07:00 nor a date and time as 2026-03-01T07:00"
        ) from None
    local = wanted.astimezone().replace(tzinfo=None)
    if local <= now:
        raise InputError(f"--deadline {text}: has passed, it is {now:%Y-%m-%dT%H:%M}")
    return local
