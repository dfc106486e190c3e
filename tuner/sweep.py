"""The loop: choose a layout, have it run, learn from how it ended; and nothing else."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import optuna
import pandas as pd

from tuner.calibration import Calibration
from tuner.errors import InputError
from tuner.files import read_json, write_json
from tuner.heuristics import Seed
from tuner.layout import Layout
from tuner.predict import implementation_of
from tuner.predict.time import step_time_ms
from tuner.report import TrialRow, TrialSource, best, read_trials
from tuner.results import SweepFolder
from tuner.search import optuna_rows
from tuner.search.dominance import needs_at_least_as_much_memory
from tuner.search.feasibility import Feasibility
from tuner.search.optuna_rows import OptunaRows
from tuner.search.predicted_rows import PredictedRows
from tuner.search.sampler import TableSampler, find_row, layout_at
from tuner.search.stopping import Certainty
from tuner.search.strategy import GridRows, Observation, RandomRows, Strategy
from tuner.study import STATES, StudyTrial, open_study
from tuner.sweep_file import Sweep
from tuner.trial import Heartbeat, Outcome, TrialFolder, TrialResult, TrialSpec

if TYPE_CHECKING:
    from launchers.base import Launcher
    from tuner.tracking import Tracker

RETRIED = frozenset({Outcome.HANG, Outcome.COMMUNICATION, Outcome.INFRASTRUCTURE})
"""Outcomes that a second attempt may change: the machine's fault, not the layout's."""

FAILURES_TO_STOP = 3
"""Infrastructure failures in a row that stop the sweep."""


class Stop(Enum):
    """Why a sweep ended."""

    EXHAUSTED = "every layout is measured or ruled out"
    CONVERGED = "no layout left is likely to be worth more (budget.min_gain)"
    TRIALS = "the budget of trials is used"
    HOURS = "the budget of hours is used"
    GPU_HOURS = "the budget of GPU-hours is used"
    INTERRUPTED = "interrupted"
    BREAKER = f"{FAILURES_TO_STOP} infrastructure failures in a row"


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
    best: TrialRow | None
    pruned: int
    """Rows ruled out without a run, by memory dominance."""
    certainty: Certainty | None
    """How near the best is to the best of all; None where nothing is modelled, measured or left."""


class Observer(Protocol):
    """Who wants to see the sweep while it runs."""

    def started(
        self, number: int, attempt: int, layout: Layout, origin: TrialSource, progress: Progress
    ) -> None:
        """An attempt of a trial begins."""

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """The running trial gave a sign of life."""

    def finished(self, row: TrialRow, pruned: int, progress: Progress) -> None:
        """A trial ended; `pruned` rows were ruled out by it."""


class SweepLoop:
    """One controller asks and tells; the trial folders are the truth.

    Args:
        sweep: What to measure.
        table: The valid layouts, the baseline's row included.
        queue: Layouts to try first, in order: the baseline, then the seeds.
        calibration: What the machine measured, for the predicted step times.
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
    ) -> None:
        self._sweep, self._table, self._folder = sweep, table, folder
        self._launcher, self._tracker, self._observer = launcher, tracker, observer
        self.rows = read_trials(folder.path)
        begun = self._begun()
        self._lost_s = sum(lost_s(folder.trial(number)) for number in range(len(begun)))
        strategy = strategy_of(sweep, table, calibration)
        self._sampler = TableSampler(table, strategy, [layout for layout, _, _ in begun])
        self._waiting: dict[int, tuple[Layout, TrialSource]] = {}
        self._pruned = self._running = 0
        trials = []
        self._certainty: Certainty | None = None
        for number, (layout, origin, result) in enumerate(begun):
            self._take(layout, number)
            trials.append(
                StudyTrial(
                    params=self._sampler.params(layout),
                    result=result,
                    source=origin.source,
                    label=layout.label(),
                )
            )
            if result is None or STATES[result.outcome] is optuna.trial.TrialState.WAITING:
                self._waiting[number] = (layout, origin)
                self._lost_s += result.durations.total_s if result else 0.0
            else:
                self._learn(number, layout, result)
        self.rows = [row for row in self.rows if row.number not in self._waiting]
        self._study = open_study(folder.study, sweep.name, self._sampler, self._sampler.space, trials)
        self._queue = list(queue)
        self._certainty = self._sampler.certainty() if self._sampler.remaining else None

    def run(self, stop: threading.Event) -> Stop:
        """Run trials until the budget is used, nothing is left, `stop` is set, or the machine keeps failing."""
        self._tracker.sync(self.rows)
        failures = 0
        while (reason := self._reason_to_end(stop)) is None:
            number, layout, origin, trial = self._ask()
            attempt = 0
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
        return reason

    def progress(self) -> Progress:
        """Where the sweep stands now."""
        used_s = self._lost_s + sum(row.result.durations.total_s for row in self.rows)
        limits = [value for value in self._time_limits_s() if value is not None]
        possible = len(self.rows) + self._running + len(self._waiting) + self._sampler.remaining
        return Progress(
            finished=len(self.rows),
            budget=min(self._sweep.budget.trials, possible),
            used_s=used_s,
            left_s=max(0.0, min(limits) - used_s) if limits else None,
            best=best(self.rows),
            pruned=self._pruned,
            certainty=self._certainty,
        )

    def _time_limits_s(self) -> tuple[float | None, float | None]:
        budget = self._sweep.budget
        hours = None if budget.hours is None else budget.hours * 3600
        gpu_hours = (
            None if budget.gpu_hours is None else budget.gpu_hours * 3600 / self._sweep.cluster.world_size
        )
        return hours, gpu_hours

    def _reason_to_end(self, stop: threading.Event) -> Stop | None:
        progress, (hours_s, gpu_hours_s) = self.progress(), self._time_limits_s()
        if stop.is_set():
            return Stop.INTERRUPTED
        if not self._waiting and not self._sampler.remaining:
            return Stop.EXHAUSTED
        if progress.finished >= self._sweep.budget.trials:
            return Stop.TRIALS
        if not self._waiting and self._has_converged():
            return Stop.CONVERGED
        if hours_s is not None and progress.used_s >= hours_s:
            return Stop.HOURS
        if gpu_hours_s is not None and progress.used_s >= gpu_hours_s:
            return Stop.GPU_HOURS
        return None

    def _has_converged(self) -> bool:
        budget = self._sweep.budget
        return (
            budget.min_gain is not None
            and self._certainty is not None
            and self._certainty.suffices(budget.min_gain, budget.confidence)
        )

    def _ask(self) -> tuple[int, Layout, TrialSource, optuna.Trial]:
        """The next layout: one that waits to be run again, else the queue's head, else the sampler's row."""
        origin = TrialSource(source="sampler")
        if not self._waiting and (queued := self._queued()) is not None:
            layout, origin = queued
            self._study.enqueue_trial(self._sampler.params(layout))
        trial = self._study.ask(dict(self._sampler.space))
        if trial.number in self._waiting:
            layout, origin = self._waiting.pop(trial.number)
        elif origin.source == "sampler":
            layout = replace(layout_at(self._table, 0), **trial.params)
        trial.set_user_attr("source", origin.source)
        trial.set_user_attr("layout", layout.label())
        self._take(layout, trial.number)
        self._running = 1
        return trial.number, layout, origin, trial

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
        spec = trial_spec(self._sweep, number, attempt, layout)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.source, origin)
        self._observer.started(number, attempt, layout, origin, self.progress())
        plan = self._launcher.plan(spec, folder)
        return self._launcher.run(plan, stop, lambda beat: self._observer.heartbeat(number, beat))

    def _tell(
        self, number: int, trial: optuna.Trial, layout: Layout, origin: TrialSource, result: TrialResult
    ) -> None:
        before, self._running = self._pruned, 0
        self._learn(number, layout, result)
        self._certainty = self._sampler.certainty() if self._sampler.remaining else None
        trial.set_user_attr("outcome", str(result.outcome))
        trial.set_user_attr("reason", result.reason)
        metrics = result.metrics
        self._study.tell(trial, metrics.step_time_ms if metrics else None, STATES[result.outcome])
        row = TrialRow(number=number, source=origin.source, note=origin.note, layout=layout, result=result)
        self.rows.append(row)
        self._tracker.log_trial(row, self._folder.trial(number))
        self._observer.finished(row, self._pruned - before, self.progress())

    def _learn(self, number: int, layout: Layout, result: TrialResult) -> None:
        if result.outcome is Outcome.OOM:
            workload, cluster = self._sweep.workload, self._sweep.cluster
            dominated = needs_at_least_as_much_memory(self._table, layout, workload, cluster)
            self._pruned += self._sampler.exclude(dominated)
        self._sampler.tell(number, Observation.of(result))

    def _take(self, layout: Layout, number: int) -> None:
        row = find_row(self._table, layout)
        if row is not None:
            self._sampler.take(row, number)

    def _begun(self) -> list[tuple[Layout, TrialSource, TrialResult | None]]:
        """Every trial folder, in order; numbers without a gap, as Optuna counts its trials."""
        begun: list[tuple[Layout, TrialSource, TrialResult | None]] = []
        while (folder := self._folder.trial(len(begun))).spec.exists():
            spec = read_json(TrialSpec, folder.spec)
            result = read_json(TrialResult, folder.result) if folder.result.exists() else None
            begun.append((spec.layout, read_json(TrialSource, folder.source), result))
        later = [row.number for row in self.rows if row.number >= len(begun)]
        if later:
            raise InputError(
                f"{folder.path}: is missing or holds no {folder.spec.name}, but trial t{later[0]:04d} has ended: put "
                "it back; to have one trial measured again, remove only its result.json"
            )
        return begun


def lost_s(folder: TrialFolder) -> float:
    """Wall clock of a trial's attempts that were followed by another one."""
    total_s, attempt = 0.0, 1
    while (aside := TrialFolder(folder.set_aside(attempt))).path.exists():
        if aside.result.exists():
            total_s += read_json(TrialResult, aside.result).durations.total_s
        attempt += 1
    return total_s


def trial_spec(sweep: Sweep, number: int, attempt: int, layout: Layout) -> TrialSpec:
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
    )


def strategy_of(sweep: Sweep, table: pd.DataFrame, calibration: Calibration | None = None) -> Strategy:
    """How a sweep chooses the rows behind its queue."""
    match sweep.sampler:
        case "random":
            return RandomRows(sweep.seed)
        case "grid":
            return GridRows()
        case "tpe":
            return OptunaRows(table, optuna_rows.tpe, sweep.seed)
        case "gp":
            return OptunaRows(table, optuna_rows.gaussian_process, sweep.seed)
        case "predicted":
            workload, cluster = sweep.workload, sweep.cluster
            implementation = implementation_of(cluster)
            predicted_ms = step_time_ms(table, workload, cluster, implementation, calibration)
            return PredictedRows(
                table, predicted_ms, Feasibility(table, workload, cluster), sweep.measurement
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


def with_row(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """The table with a layout's row, appended where the layout lies outside the searched values."""
    if find_row(table, layout) is not None:
        return table
    row = pd.DataFrame([{knob: getattr(layout, knob) for knob in table.columns}])
    joined = pd.concat([table, row], ignore_index=True)
    return joined.astype(
        {name: kind for name, kind in table.dtypes.items() if not isinstance(kind, pd.CategoricalDtype)}
    )
