"""How far a sweep is, for people who watch it. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tuner.analysis.figures import best_trial
from tuner.search.stopping import Certainty
from tuner.sweep.state import SweepState
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    from tuner.sweep.policy import Policy
    from tuner.sweep.searcher import Searcher

SearchPart = Literal["grid", "refinement"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a sweep is."""

    finished: int
    """Finished trials, those of earlier runs included."""
    budget: int
    """Trials that the sweep may take: its budget, or fewer if fewer layouts are left."""
    used_s: float
    """Wall clock in seconds of all trials so far, every attempt included."""
    left_s: float | None
    """Seconds until the first time limit of the budget; None if there is no time limit."""
    best: FinishedTrial | None
    pruned: int
    """Rows ruled out without a run, by memory dominance."""
    certainty: Certainty | None
    """How near the best measured row is to the best of all; None if nothing is modelled, measured or left."""
    own_s: float = 0.0
    """Seconds without a trial in flight in this run of the tuner, which then chose, learnt or wrote."""
    run_s: float = 0.0
    """Wall clock in seconds of this run of the tuner, from the start of its first trial to the end of its last."""
    part: SearchPart | None = None
    """The part of the search that is under way; None if the sweep has one part only."""


def progress_of(
    state: SweepState,
    policy: "Policy",
    searcher: "Searcher",
    *,
    now_s: float,
    own_s: float = 0.0,
    run_s: float = 0.0,
) -> Progress:
    """Return how far a sweep is.

    Args:
        state: The state of the sweep.
        policy: Says what the sweep may use.
        searcher: Says what the sweep has learnt.
        now_s: The time, in seconds since the epoch.
        own_s: Seconds without a trial in flight, in this run of the tuner.
        run_s: Seconds from the start of this run's first trial to the end of its last.
    """
    ledger = policy.ledger(state, now_s)
    part: SearchPart | None = None
    if policy.problem.refined:
        part = "refinement" if state.centres else "grid"
    finals_left = max(0, ledger.before_finals.reserve() - len(ledger.finals))
    possible = state.next_number + searcher.remaining + finals_left
    trials = policy.budget.trials
    return Progress(
        finished=len(state.ended),
        budget=trials if part == "grid" else min(trials, possible),
        used_s=ledger.finished_s,
        left_s=ledger.left_s(),
        best=best_trial(state.ended),
        pruned=searcher.pruned,
        certainty=searcher.certainty(),
        own_s=own_s,
        run_s=run_s,
        part=part,
    )
