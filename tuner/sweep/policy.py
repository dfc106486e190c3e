"""Decides from the state of a sweep alone what it does next. Pure: nothing here starts, writes or learns anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tuner.analysis.candidates import candidates, ruled_out
from tuner.analysis.drift import canary_due, drift
from tuner.analysis.finals import eligible_finalists, expected_trial_s, next_final
from tuner.core.layout import Layout
from tuner.search.grid import GRID_SHARE
from tuner.search.problem import Problem
from tuner.search.refinement import choose_centres
from tuner.space.heuristics import Seed
from tuner.sweep.budget import Deadline, Ledger, Stop, shrunk
from tuner.sweep.configuration import Budget
from tuner.sweep.state import Halt, RunningTrial, SweepState, WaitingTrial
from tuner.trial.finished import FinishedTrial, TrialSource

if TYPE_CHECKING:
    from tuner.sweep.searcher import Searcher

SIDE_BY_SIDE: Final = frozenset({"seed", "sampler"})
"""Sources of the trials that may run beside others. Trials of all other sources run alone, because their measurements
are compared with one another."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A layout to try before the strategy chooses."""

    layout: Layout
    source: TrialSource


def queue_of(baseline: Layout | None, seeds: Sequence[Seed]) -> tuple[Queued, ...]:
    """The layouts to try first: the baseline, then the seeds; the best seed stands in for a missing baseline."""
    queue: list[Queued] = []
    if baseline is not None:
        queue.append(Queued(baseline, TrialSource(source="baseline", note="stated in the sweep file")))
    for seed in seeds:
        note = f"{seed.source}; {seed.note}" if seed.note else seed.source
        queue.append(Queued(seed.layout, TrialSource(source="seed" if queue else "baseline", note=note)))
    return tuple(queue)


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an attempt at a trial."""

    trial: RunningTrial
    give_up_above_ms: float | None
    """The step time above which the trial may give up; None never ends it early. See TrialSpec."""


@dataclass(frozen=True, slots=True)
class Refine:
    """Begin the refinement around these trials."""

    centres: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until a running trial ends or somebody asks for something."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The sweep is over."""

    reason: Stop


Action = Launch | Refine | Wait | Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Decides what a sweep does next, from what it may use and what it tries first.

    With one slot, an action follows from the state and the clock alone. With several slots, the trials of the search
    run side by side; a decision that needs every result (a refinement, a canary, a repeat, a final) waits for them.
    """

    problem: Problem
    budget: Budget
    queue: tuple[Queued, ...]
    began_s: float
    """When this run of the sweep began, in seconds since the epoch."""
    deadline_s: float | None = None
    """When the last trial should have ended, in seconds since the epoch; None without a deadline."""

    def ledger(self, state: SweepState, now_s: float) -> Ledger:
        """What the sweep may use and has used at the time `now_s`, in seconds since the epoch."""
        deadline = None
        if self.deadline_s is not None:
            deadline = Deadline(began_s=self.began_s, now_s=now_s, deadline_s=self.deadline_s)
        return Ledger(
            budget=self.budget,
            world_size=self.problem.cluster.world_size,
            trials=state.ended,
            lost_s=state.lost_s,
            running=len(state.running),
            deadline=deadline,
        )

    def is_out_of_time(self, state: SweepState, now_s: float) -> bool:
        """Whether the deadline has ended the search; the caller records that in the state by the event TimeRanOut."""
        if state.is_out_of_time or state.waiting or self.deadline_s is None:
            return state.is_out_of_time
        return self.ledger(state, now_s).search_is_over() is Stop.DEADLINE

    def next_action(self, state: SweepState, searcher: "Searcher", slots: int, now_s: float) -> Action:
        """Return what to do next.

        Args:
            state: The state of the sweep.
            searcher: What has been learnt from its trials.
            slots: Trials that may start now.
            now_s: The time, in seconds since the epoch.
        """
        if state.is_broken or state.halt in (Halt.STOPPING, Halt.CLOSING):
            if state.running:
                return Wait()
            return Finish(Stop.BREAKER if state.is_broken else Stop.INTERRUPTED)
        if state.halt is Halt.PAUSED or not slots or any(map(_runs_alone, state.running)):
            return Wait()
        if state.waiting:
            return self._again(state, now_s)
        over = self._search_is_over(state, searcher, now_s)
        if over is None:
            return self._search(state, searcher, now_s)
        if isinstance(over, Refine):
            return Wait() if state.running else over
        return self._after_search(state, over, now_s)

    def finals_note(self, state: SweepState, now_s: float) -> str | None:
        """Return a sentence if the finals are smaller than the sweep asks for, or not complete; None otherwise."""
        ledger = self.ledger(state, now_s)
        plan = ledger.plan()
        if ledger.finals and next_final(state.ended, plan) is not None:
            return f"The finals are not complete: {len(ledger.finals)} of {plan.trials} trials ran."
        return shrunk(ledger.wanted, plan, len(eligible_finalists(state.ended)))

    def _again(self, state: SweepState, now_s: float) -> Action:
        """Run the first waiting trial.

        A second attempt follows a failed first one at once, even beyond the budget, but never after the deadline.
        """
        trial = state.waiting[0]
        if _runs_alone(trial) and state.running:
            return Wait()
        launch = Launch(
            RunningTrial(
                number=trial.number,
                layout=trial.layout,
                source=trial.source,
                attempt=trial.attempts_spent + 1,
            ),
            give_up_above_ms(state.ended, trial.source),
        )
        has_passed = self.deadline_s is not None and self.deadline_s <= now_s
        if trial.attempts_spent and not has_passed:
            return launch
        return self._within_budget(state, launch, None, now_s)

    def _search(self, state: SweepState, searcher: "Searcher", now_s: float) -> Action:
        """Launch a canary if one is due, else the next layout of the queue, else the searcher's suggestion."""
        layout = canary_due(state.ended, self.budget.canary_every)
        if layout is not None:
            return self._new(state, layout, TrialSource(source="canary"), None, now_s)
        for queued in self.queue:
            # The baseline runs whatever its prediction is; a seed runs only if it promises to be worth a trial.
            is_baseline = queued.source.source == "baseline"
            if searcher.is_available(queued.layout) and (is_baseline or searcher.promises(queued.layout)):
                return self._new(state, queued.layout, queued.source, None, now_s)
        suggested = searcher.suggest(state.next_number)
        return self._new(state, suggested, TrialSource(source="sampler"), None, now_s)

    def _after_search(self, state: SweepState, over: Stop, now_s: float) -> Action:
        """Repeat the disturbed trials, then run the finals."""
        if state.running:
            return Wait()
        ledger = self.ledger(state, now_s)
        disturbed = ledger.next_repeat()
        if disturbed is not None:
            source = TrialSource(source="repeat", note=f"of t{disturbed.number:04d}")
            return self._new(state, disturbed.layout, source, over, now_s)
        finalist = next_final(state.ended, ledger.plan())
        if finalist is None:
            return Finish(over)
        return self._new(state, finalist, TrialSource(source="final"), over, now_s)

    def _new(
        self, state: SweepState, layout: Layout, source: TrialSource, over: Stop | None, now_s: float
    ) -> Action:
        """Launch a new trial, if the budget and the running trials allow it."""
        source = TrialSource(source=source.source, note=source.note, around=state.centres)
        trial = RunningTrial(number=state.next_number, layout=layout, source=source, attempt=1)
        if _runs_alone(trial) and state.running:
            return Wait()
        launch = Launch(trial, give_up_above_ms(state.ended, source))
        return self._within_budget(state, launch, over, now_s)

    def _within_budget(self, state: SweepState, launch: Launch, over: Stop | None, now_s: float) -> Action:
        used_up = self.ledger(state, now_s).used_up(expected_trial_s(state.ended, [launch.trial.layout]))
        if used_up is None:
            return launch
        return Wait() if state.running else Finish(over or used_up)

    def _search_is_over(self, state: SweepState, searcher: "Searcher", now_s: float) -> Stop | Refine | None:
        """Return why the search ends, or the refinement that begins now; None while the search goes on."""
        ledger = self.ledger(state, now_s)
        reason = ledger.search_is_over()
        if reason is None and state.is_out_of_time:
            reason = Stop.DEADLINE
        is_grid = bool(self.problem.refined) and not state.centres
        if reason is None and is_grid and self._grid_is_over(searcher, ledger):
            # Without a measurement there is no layout to refine.
            centres = choose_centres(state.ended, self.problem)
            if centres:
                return Refine(centres)
        if not searcher.remaining:
            return Stop.EXHAUSTED
        return Stop.CONVERGED if reason is not Stop.TRIALS and self._has_converged(searcher) else reason

    def _grid_is_over(self, searcher: "Searcher", ledger: Ledger) -> bool:
        """Whether nothing is left to gain in the grid, or its share of the budget is used."""
        is_searched = not searcher.remaining or self._has_converged(searcher)
        return is_searched or ledger.search_is_over(GRID_SHARE) is not None

    def _has_converged(self, searcher: "Searcher") -> bool:
        certainty = searcher.certainty()
        min_gain = self.budget.min_gain
        return (
            min_gain is not None
            and certainty is not None
            and certainty.suffices(min_gain, self.budget.confidence)
        )


def give_up_above_ms(ended: Sequence[FinishedTrial], source: TrialSource) -> float | None:
    """Return the step time in ms above which a trial may give up; None if it must measure to the end.

    It is the upper end of the best layout's 95% interval, at the machine's present speed. Only trials that look for
    a faster layout give up; all other trials are run for their measurement.
    """
    if source.source not in SIDE_BY_SIDE:
        return None
    drifted = drift(ended)
    fastest = candidates(ended, drifted, ruled_out(ended))
    if not fastest:
        return None
    present = drifted.factor(max(ended, key=lambda trial: trial.number)) if drifted else 1.0
    return fastest[0].metrics.step_time_high_ms * present / fastest[0].factor


def _runs_alone(trial: RunningTrial | WaitingTrial) -> bool:
    return trial.source.source not in SIDE_BY_SIDE
