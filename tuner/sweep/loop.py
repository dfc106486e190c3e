"""The loop: choose a layout, have it run, learn from how it ended; and nothing else."""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import optuna
import pandas as pd

from tuner.analysis.candidates import candidates, ruled_out
from tuner.analysis.runs import counting_trials
from tuner.analysis.centres import refinement_centres
from tuner.analysis.drift import canary_due, drift
from tuner.analysis.figures import best_trial
from tuner.analysis.finals import eligible_finalists, expected_trial_s, next_final
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import make_folder, read_json, write_json
from tuner.predict.calibration import Calibration
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.feasibility import MIN_FIT
from tuner.search.observation import STATES, Observation
from tuner.search.grid import GRID_SHARE
from tuner.search.refinement import centre_layouts, choose_centres, with_refinements
from tuner.search.sampler import TableSampler
from tuner.search.stopping import Certainty
from tuner.search.strategies import strategy_of
from tuner.space.heuristics import Seed
from tuner.space.table import find_row, layout_at
from tuner.sweep.budget import FAILURES_TO_STOP, Clock, Ledger, Stop, shrunk
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import SweepFolder
from tuner.sweep.study import StudyTrial, open_study
from tuner.trial.contract import Heartbeat, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import SEARCHED, FinishedTrial, TrialSource, draws_weights, read_trials

if TYPE_CHECKING:
    from tuner.trial.launcher import Launcher

RETRIED = frozenset({Outcome.HANG, Outcome.COMMUNICATION, Outcome.INFRASTRUCTURE})
"""Outcomes that a second attempt may change: the machine's fault, not the layout's."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the sweep stands."""

    finished: int
    """Trials finished, earlier runs included."""
    budget: int
    """Trials it may take: the budget, or fewer where fewer layouts are left."""
    used_s: float
    """Wall clock of all trials so far, every attempt included."""
    left_s: float | None
    """What the budget of hours or GPU-hours leaves; None without one."""
    best: FinishedTrial | None
    pruned: int
    """Rows ruled out without a run, by memory dominance."""
    certainty: Certainty | None
    """How near the best is to the best of all; None where nothing is modelled, measured or left."""
    own_s: float = 0.0
    """What the tuner took between the trials of this run: to choose, to learn, to write."""
    run_s: float = 0.0
    """Wall clock of this run, from its first trial's begin to its last one's end."""
    stage: int | None = None
    """1 or 2; None of a sweep with one stage."""


class Tracker(Protocol):
    """Logs finished trials elsewhere; no method waits or raises."""

    def sync(self, rows: Iterable[FinishedTrial]) -> None:
        """Log those of these trials that are missing there."""

    def log_trial(self, row: FinishedTrial, folder: TrialFolder) -> None:
        """Log a trial that has just ended."""


class Observer(Protocol):
    """Who wants to see the sweep while it runs."""

    def started(
        self, number: int, attempt: int, layout: Layout, origin: TrialSource, progress: Progress
    ) -> None:
        """An attempt of a trial begins."""

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """The running trial gave a sign of life."""

    def finished(self, row: FinishedTrial, pruned: int, progress: Progress) -> None:
        """A trial ended; `pruned` rows were ruled out by it."""


Begun = tuple[Layout, TrialSource, TrialResult | None, int | None]
"""What a trial's folder holds, and its `attempts_spent`."""


@dataclass(frozen=True, slots=True)
class Step:
    """What runs next."""

    origin: TrialSource
    layout: Layout | None = None
    """None leaves it to the sampler."""


class SweepLoop:
    """One controller asks and tells; the trial folders are the truth.

    Args:
        sweep: What to measure.
        table: The valid layouts, the baseline's row included; those of the first stage, where the sweep has two.
        queue: Layouts to try first, in order: the baseline, then the seeds.
        calibration: What the machine measured, for the predicted step times.
        deadline_s: When the last trial should have ended, in seconds since the epoch.
    """

    def __init__(
        self,
        sweep: Sweep,
        table: pd.DataFrame,
        queue: Sequence[tuple[Layout, TrialSource]],
        folder: SweepFolder,
        launcher: "Launcher",
        tracker: "Tracker",
        observer: Observer,
        calibration: Calibration | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._sweep, self._table, self._folder, self._calibration = sweep, table, folder, calibration
        self._launcher, self._tracker, self._observer = launcher, tracker, observer
        self._deadline_s, self._began_s = deadline_s, time.time()
        self._out_of_time = False
        self._own_s = self._first_s = self._last_s = 0.0
        self._running = 0
        self._queue = list(queue)
        self.rows = read_trials(folder.path)
        begun = self._begun()
        self._lost_s = sum(lost_s(folder.trial(number)) for number in range(len(begun)))
        self._waiting: dict[int, tuple[Layout, TrialSource, int]] = {}
        for number, (layout, origin, result, spent) in enumerate(begun):
            if spent is not None:
                self._waiting[number] = (layout, origin, spent)
                self._lost_s += result.durations.total_s if result else 0.0
        self.rows = [row for row in self.rows if row.number not in self._waiting]
        self._tried = [layout for layout, _, _, _ in begun]
        self._around: tuple[int, ...] = ()
        self._begin_stage(
            refinement_centres([origin for _, origin, _, _ in begun]) if sweep.refined else (), begun
        )

    def run(self, stop: threading.Event) -> Stop:
        """Run trials until the budget is used, nothing is left, `stop` is set, or the machine keeps failing."""
        self._tracker.sync(self.rows)
        failures = 0
        while not isinstance(step := self._next(stop), Stop):
            number, layout, origin, trial, attempt = self._ask(step)
            while True:
                attempt += 1
                result = self._attempt(number, attempt, layout, origin, stop)
                failures = failures + 1 if result.outcome is Outcome.INFRASTRUCTURE else 0
                if failures >= FAILURES_TO_STOP:
                    return Stop.BREAKER
                if result.outcome is Outcome.INTERRUPTED:
                    return Stop.INTERRUPTED
                if result.outcome not in RETRIED or (
                    attempt > 1 and result.outcome is not Outcome.INFRASTRUCTURE
                ):
                    break
                self._lost_s += result.durations.total_s
            self._tell(number, trial, layout, origin, result)
        return step

    def progress(self) -> Progress:
        """Where the sweep stands now."""
        ledger = self._ledger()
        finals = max(0, ledger.searched.reserve() - len(ledger.finals))
        possible = len(self.rows) + self._running + len(self._waiting) + self._sampler.remaining + finals
        return Progress(
            finished=len(self.rows),
            budget=self._sweep.budget.trials
            if self._stage == 1
            else min(self._sweep.budget.trials, possible),
            used_s=ledger.used_s,
            left_s=ledger.left_s(),
            best=best_trial(self.rows),
            pruned=self._pruned,
            certainty=self._certainty,
            own_s=self._own_s,
            run_s=self._last_s - self._first_s,
            stage=self._stage,
        )

    def finals_note(self) -> str | None:
        """What to say of finals that are smaller than the sweep asks for, or not through."""
        ledger = self._ledger()
        plan = ledger.plan()
        if ledger.finals and next_final(self.rows, plan) is not None:
            return f"The finals are not through: {len(ledger.finals)} of {plan.trials} trials ran."
        return shrunk(ledger.wanted, plan, len(eligible_finalists(self.rows)))

    def _ledger(self) -> Ledger:
        clock = None
        if self._deadline_s is not None:
            clock = Clock(began_s=self._began_s, now_s=time.time(), deadline_s=self._deadline_s)
        return Ledger(
            budget=self._sweep.budget,
            world_size=self._sweep.cluster.world_size,
            rows=tuple(self.rows),
            lost_s=self._lost_s,
            clock=clock,
        )

    def _next(self, stop: threading.Event) -> Step | Stop:
        """What runs next: what waits to be run again, else the search, else what is disturbed, else the finals."""
        if stop.is_set():
            return Stop.INTERRUPTED
        ledger, over, step = self._ledger(), None, None
        if self._waiting:
            layout, origin, _ = self._waiting[min(self._waiting)]
            step = Step(origin, layout)
        elif (over := self._search_is_over(ledger)) is None:
            step = self._next_of_search()
        else:
            step = self._next_after_search(ledger)
        if step is None:
            assert over is not None, "a search that goes on has a next row"
            return over
        known = [step.layout] if step.layout is not None else []
        if not self._waiting:
            step = replace(step, origin=replace(step.origin, around=self._around))
        used_up = ledger.used_up(expected_trial_s(self.rows, known))
        return step if used_up is None else over or used_up

    def _search_is_over(self, ledger: Ledger) -> Stop | None:
        reason = ledger.search_is_over()
        # Within one run time only passes: finals that go faster than expected do not bring the search back.
        self._out_of_time |= reason is Stop.DEADLINE
        if reason is None and self._out_of_time:
            reason = Stop.DEADLINE
        first_is_over = reason is None and self._stage == 1 and self._stage_is_over(ledger)
        # Where nothing is measured yet, there is nothing to refine.
        if first_is_over and (best_of_first := choose_centres(self.rows, self._sweep.problem)):
            self._begin_stage(best_of_first, self._begun())
        if not self._sampler.remaining:
            return Stop.EXHAUSTED
        return Stop.CONVERGED if reason is not Stop.TRIALS and self._has_converged() else reason

    @property
    def _stage(self) -> int | None:
        if not self._sweep.refined:
            return None
        return 2 if self._around else 1

    def _stage_is_over(self, ledger: Ledger) -> bool:
        """Whether the first of two stages is: nothing to gain in it, or its share of the budget is used."""
        ended = not self._sampler.remaining or self._has_converged()
        return ended or ledger.search_is_over(GRID_SHARE) is not None

    def _has_converged(self) -> bool:
        budget = self._sweep.budget
        return (
            budget.min_gain is not None
            and self._certainty is not None
            and self._certainty.suffices(budget.min_gain, budget.confidence)
        )

    def _next_of_search(self) -> Step:
        """A canary where one is due, else the queue's next, else the sampler's row."""
        if (layout := canary_due(self.rows, self._sweep.budget.canary_every)) is not None:
            return Step(TrialSource(source="canary"), layout)
        if (queued := self._queued()) is not None:
            return Step(queued[1], queued[0])
        return Step(TrialSource(source="sampler"))

    def _next_after_search(self, ledger: Ledger) -> Step | None:
        """What was disturbed is measured again, then come the finals."""
        if (row := ledger.next_repeat()) is not None:
            return Step(TrialSource(source="repeat", note=f"of t{row.number:04d}"), row.layout)
        layout = next_final(self.rows, ledger.plan())
        return None if layout is None else Step(TrialSource(source="final"), layout)

    def _ask(self, step: Step) -> tuple[int, Layout, TrialSource, optuna.Trial, int]:
        """Have Optuna number a step, and its sampler choose where the step leaves it to that.

        Also gives how many attempts at the trial are spent.
        """
        if step.layout is not None and not self._waiting:
            self._study.enqueue_trial(self._sampler.params(step.layout))
        trial = self._study.ask(dict(self._sampler.space))
        layout = step.layout or replace(layout_at(self._table, 0), **trial.params)
        spent = 0
        if trial.number in self._waiting:
            *_, spent = self._waiting.pop(trial.number)
        else:
            self._tried.append(layout)
        trial.set_user_attr("source", step.origin.source)
        trial.set_user_attr("layout", layout.label())
        self._take(layout, trial.number, step.origin)
        self._running = 1
        return trial.number, layout, step.origin, trial, spent

    def _queued(self) -> tuple[Layout, TrialSource] | None:
        """Take the queue's next: the baseline whatever is predicted, a seed while it promises something."""
        for place, (layout, origin) in enumerate(self._queue):
            row = find_row(self._table, layout)
            if row is None or not self._sampler.is_available(row):
                continue
            if origin.source == "baseline" or self._sampler.promises(row):
                return self._queue.pop(place)
        return None

    def _attempt(
        self, number: int, attempt: int, layout: Layout, origin: TrialSource, stop: threading.Event
    ) -> TrialResult:
        folder = self._folder.trial(number)
        spec = trial_spec(self._sweep, number, attempt, layout, self._give_up_above_ms(origin))
        make_folder(folder.path)
        write_json(folder.source, origin)
        self._observer.started(number, attempt, layout, origin, self.progress())
        plan = self._launcher.plan(spec, folder)
        begun_s = time.monotonic()
        self._own_s += begun_s - self._last_s if self._last_s else 0.0
        self._first_s = self._first_s or begun_s
        try:
            return self._launcher.run(plan, stop, lambda beat: self._observer.heartbeat(number, beat))
        finally:
            self._last_s = time.monotonic()

    def _give_up_above_ms(self, origin: TrialSource) -> float | None:
        """The upper end of the best layout's interval, at the machine's present speed; None to measure to the end.

        Only trials that look for a faster layout give up: of the others the measurement itself is wanted.
        """
        known = drift(self.rows)
        found = candidates(self.rows, known, ruled_out(self.rows))
        if origin.source not in ("seed", "sampler") or not found:
            return None
        present = known.factor(max(self.rows, key=lambda row: row.number)) if known else 1.0
        return found[0].metrics.step_time_high_ms * present / found[0].factor

    def _tell(
        self, number: int, trial: optuna.Trial, layout: Layout, origin: TrialSource, result: TrialResult
    ) -> None:
        before, self._running = self._pruned, 0
        row = FinishedTrial(
            number=number,
            source=origin.source,
            note=origin.note,
            around=origin.around,
            layout=layout,
            precision=self._sweep.workload.precision,
            draws_weights=draws_weights(self._sweep.program, self._sweep.workload, layout),
            routes_at_random=self._sweep.workload.moe_router_force_load_balancing,
            result=result,
        )
        known = drift(self.rows)
        self.rows.append(row)
        if origin.source == "repeat" or drift(self.rows) != known:
            self._relearn()
        elif origin.source in SEARCHED:
            self._learn(row, row)
            self._certainty = self._known_certainty()
        trial.set_user_attr("outcome", str(result.outcome))
        trial.set_user_attr("reason", result.reason)
        metrics = result.metrics
        self._study.tell(trial, metrics.step_time_ms if metrics else None, STATES[result.outcome])
        self._tracker.log_trial(row, self._folder.trial(number))
        self._observer.finished(row, self._pruned - before, self.progress())

    def _begin_stage(self, around: tuple[int, ...], begun: Sequence[Begun]) -> None:
        """Search the table, in the second stage with what lies around these trials behind its rows.

        The study is opened for each: its distributions hold every value that a row may take.
        """
        self._around = around
        self._table = with_refinements(
            self._table, centre_layouts(around, self._tried), self._sweep.problem, MIN_FIT
        )
        self._relearn()
        trials = [
            StudyTrial(
                params=self._sampler.params(layout),
                result=result if spent is None else None,
                source=origin.source,
                label=layout.label(),
            )
            for layout, origin, result, spent in begun
        ]
        self._study = open_study(
            self._folder.study, self._sweep.name, self._sampler, self._sampler.space, trials
        )

    def _relearn(self) -> None:
        """Learn from all trials anew: what counts as measured has changed."""
        strategy = strategy_of(self._sweep.problem, self._table, self._calibration)
        self._sampler = TableSampler(self._table, strategy, self._tried)
        self._pruned = 0
        by_number = {row.number: row for row in sorted(self.rows, key=lambda row: row.number)}
        for number, row in counting_trials(self.rows).items():
            self._take(row.layout, number, TrialSource(source=by_number[number].source))
            self._learn(by_number[number], row)
        for number, (layout, origin, _) in self._waiting.items():
            self._take(layout, number, origin)
        if hasattr(self, "_study"):
            self._study.sampler = self._sampler
        self._certainty = self._known_certainty()

    def _known_certainty(self) -> Certainty | None:
        found = self._sampler.certainty() if self._sampler.remaining else None
        searched = {None: "the space", 1: "the grid", 2: "the grid and its refinement"}[self._stage]
        return found and replace(found, searched=searched)

    def _learn(self, first: FinishedTrial, row: FinishedTrial) -> None:
        """Learn of a trial of the search what `row` measured: itself, or its repeat; the machine's drift taken out."""
        if row.result.outcome is Outcome.OOM:
            workload, cluster = self._sweep.workload, self._sweep.cluster
            dominated = needs_at_least_as_much_memory(self._table, row.layout, workload, cluster)
            self._pruned += self._sampler.exclude(dominated)
        known = drift(self.rows)
        factor, told = known.factor(row) if known else 1.0, Observation.of(row.result)
        if factor != 1.0:
            told = replace(
                told,
                step_time_ms=None if told.step_time_ms is None else told.step_time_ms / factor,
                slower_than_ms=None if told.slower_than_ms is None else told.slower_than_ms / factor,
            )
        self._sampler.tell(first.number, told)

    def _take(self, layout: Layout, number: int, origin: TrialSource) -> None:
        """Have the sampler know that a trial of the search measures this layout; other trials teach it nothing."""
        row = find_row(self._table, layout)
        if row is not None and origin.source in SEARCHED:
            self._sampler.take(row, number)

    def _begun(self) -> list[Begun]:
        """Every trial folder; numbers without a gap, as Optuna counts its trials."""
        begun: list[Begun] = []
        while (folder := self._folder.trial(len(begun))).spec.exists():
            spec = read_json(TrialSpec, folder.spec)
            result = read_json(TrialResult, folder.result) if folder.result.exists() else None
            spent = attempts_spent(spec.attempt, result)
            begun.append((spec.layout, read_json(TrialSource, folder.source), result, spent))
        later = [row.number for row in self.rows if row.number >= len(begun)]
        if later:
            raise InputError(
                f"{folder.path}: is missing or holds no {folder.spec.name}, but trial t{later[0]:04d} has ended: put "
                "it back; to have one trial measured again, remove only its result.json"
            )
        return begun


def attempts_spent(attempt: int, result: TrialResult | None) -> int | None:
    """How many attempts of a begun trial count where it has to run again; None where it is over.

    Args:
        attempt: The last one begun, from 1.
        result: How that ended; None where the tuner was killed before it did.
    """
    if result is None or result.outcome is Outcome.INTERRUPTED:
        return attempt - 1
    if result.outcome is Outcome.INFRASTRUCTURE:
        return 0
    return attempt if result.outcome in RETRIED and attempt == 1 else None


def lost_s(folder: TrialFolder) -> float:
    """Wall clock of a trial's attempts that were followed by another one."""
    total_s, attempt = 0.0, 1
    while (aside := TrialFolder(folder.set_aside(attempt))).path.exists():
        if aside.result.exists():
            total_s += read_json(TrialResult, aside.result).durations.total_s
        attempt += 1
    return total_s


def trial_spec(
    sweep: Sweep, number: int, attempt: int, layout: Layout, give_up_above_ms: float | None = None
) -> TrialSpec:
    """The spec of one trial of a sweep."""
    return TrialSpec(
        sweep=sweep.name,
        number=number,
        attempt=attempt,
        workload=sweep.workload,
        cluster=sweep.cluster,
        layout=layout,
        program=sweep.program,
        measurement=sweep.measurement,
        limits=sweep.limits,
        seed=sweep.seed,
        give_up_above_ms=give_up_above_ms,
    )


def queue_of(baseline: Layout | None, seeds: Sequence[Seed]) -> list[tuple[Layout, TrialSource]]:
    """The layouts to try first: the baseline, then the seeds. Without a stated baseline the best seed stands for it."""
    queue: list[tuple[Layout, TrialSource]] = []
    if baseline is not None:
        queue.append((baseline, TrialSource(source="baseline", note="stated in the sweep file")))
    for seed in seeds:
        note = f"{seed.source}; {seed.note}" if seed.note else seed.source
        queue.append((seed.layout, TrialSource(source="seed" if queue else "baseline", note=note)))
    return queue
