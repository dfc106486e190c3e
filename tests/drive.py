"""A sweep driven through policy, state and searcher alone: neither thread nor file nor sleep."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tests.replay import TRIAL_S, replayed, table_of
from tuner.core.layout import Layout
from tuner.space.heuristics import seeds
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import Sweep
from tuner.sweep.policy import Finish, Launch, Policy, Refine, Wait, queue_of
from tuner.sweep.searcher import Search, Searcher
from tuner.sweep.specs import finished_trial, trial_spec
from tuner.sweep.state import (
    AttemptFailed,
    RefinementBegan,
    RunningTrial,
    SweepState,
    TimeRanOut,
    TrialBegan,
    TrialEnded,
    advanced,
    is_over,
)
from tuner.trial.contract import Outcome, TrialResult, TrialSpec

Machine = Callable[[TrialSpec], TrialResult]
"""What becomes of a trial."""


def formula(spec: TrialSpec) -> TrialResult:
    """The test model's formulas, on a cluster with room for every layout."""
    return replayed(spec, limit_gib=1000.0)


@dataclass(kw_only=True)
class Drive:
    """A sweep, and the machine that it would run on."""

    sweep: Sweep
    machine: Machine = formula
    slots: int = 1
    seed: int = 0
    """Draws which of the running trials ends next."""
    deadline_s: float | None = None
    state: SweepState = field(default_factory=SweepState)
    now_s: float = 0.0
    launched: list[RunningTrial] = field(default_factory=list)

    def __post_init__(self) -> None:
        table = table_of(self.sweep)
        problem = self.sweep.problem
        self.search = Search(problem=problem, grid=table)
        queue = queue_of(self.sweep.baseline, seeds(problem.workload, problem.cluster, table))
        self.policy = Policy(
            problem=problem, budget=self.sweep.budget, queue=queue, began_s=0.0, deadline_s=self.deadline_s
        )
        self.searcher = self.search.searcher(self.state)
        self.random = np.random.default_rng(self.seed)

    def steps(self) -> Iterator[Stop | None]:
        """Take one action after the other; yields None after each, and at last why the sweep ended."""
        while True:
            if self.policy.is_out_of_time(self.state, self.now_s):
                self.state = advanced(self.state, TimeRanOut())
            free = self.slots - len(self.state.running)
            match self.policy.next_action(self.state, self.searcher, free, self.now_s):
                case Finish(reason):
                    yield reason
                    return
                case Refine(centres):
                    self.state = advanced(self.state, RefinementBegan(centres))
                    self.searcher = self.search.searcher(self.state)
                case Launch(trial):
                    self.launched.append(trial)
                    self.state = advanced(self.state, TrialBegan(trial))
                    self.searcher.take(trial.number, trial.layout, trial.source.source)
                case Wait():
                    self._end_one()
            yield None

    def to_end(self) -> Stop:
        """Run the sweep until it ends."""
        for reason in self.steps():
            if reason is not None:
                return reason
        raise AssertionError("a sweep ends")

    def _end_one(self) -> None:
        assert self.state.running, "nobody waits while nothing runs"
        trial = self.state.running[int(self.random.integers(len(self.state.running)))]
        self.now_s += TRIAL_S
        result = self.machine(trial_spec(self.sweep, trial.number, trial.attempt, trial.layout))
        if not is_over(result, trial.attempt):
            self.state = advanced(self.state, AttemptFailed(trial.number, result))
            return
        finished = finished_trial(self.sweep, trial, result)
        before, self.state = self.state, advanced(self.state, TrialEnded(finished))
        self.searcher = self.search.after(self.searcher, before, self.state, finished)


def resumed_at(state: SweepState) -> SweepState:
    """What the next tuner reads if this one dies now: running trials wait, and nobody has asked for anything."""
    for trial in state.running:
        result = TrialResult(outcome=Outcome.INTERRUPTED, reason="killed")
        state = advanced(state, AttemptFailed(trial.number, result))
    return replace(state, halt=SweepState().halt, failures=0, is_out_of_time=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """All that a searcher says."""

    remaining: int
    pruned: int
    suggested: Layout | None
    losses: tuple[float, ...]
    """How much slower the best may be than the best of all, as draws to nine digits: sums depend on their order."""


def knowledge(searcher: Searcher, number: int) -> Knowledge:
    """All that a searcher says of trial `number`."""
    certainty = searcher.certainty()
    return Knowledge(
        remaining=searcher.remaining,
        pruned=searcher.pruned,
        suggested=searcher.suggest(number) if searcher.remaining else None,
        losses=() if certainty is None else tuple(certainty.losses.round(9).tolist()),
    )
