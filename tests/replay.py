"""Sweeps without processes: a launcher whose program is a formula of the layout, and a loop around it."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pandas as pd

from launchers.local.torchrun import TorchrunLauncher
from tests.trials import CLUSTER, WORKLOAD, metrics_of
from tuner.analysis.figures import best_trial
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.files import parse, to_data, write_json, write_text
from tuner.predict.calibration import Machine
from tuner.search.grid import grid_space
from tuner.space.heuristics import seeds
from tuner.space.table import with_row
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import Sweep, SweepFile
from tuner.sweep.controller import Clock, Controller, resumed
from tuner.sweep.folder import SweepFolder
from tuner.sweep.policy import queue_of
from tuner.sweep.progress import Progress
from tuner.sweep.resolution import resolve
from tuner.sweep.runner import AttemptEnded, Beat
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.state import RunningTrial, SweepState
from tuner.sweep.study import StudyProjection
from tuner.tracking.spool import Status
from tuner.trial.contract import Durations, Heartbeat, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial
from tuner.trial.launcher import WHOLE_MACHINE, LaunchPlan, Place

SEARCHED: Mapping[str, Any] = {
    "tp": [1, 2, 4],
    "pp": [1, 2],
    "micro_batch_size": [1, 2, 4],
    "recompute_granularity": ["none", "full"],
    "recompute_method": ["none", "uniform"],
    "recompute_num_layers": [0, 1],
}
"""34 valid layouts of the test model on eight GPUs: tp x pp x micro-batch x (nothing or everything recomputed)."""

TRIALS = 8
"""The budget of a sweep that states none."""

TRIAL_S = 60.0
"""Wall clock of every replayed trial."""


class KilledError(BaseException):
    """The tuner itself dies, as by SIGKILL: nothing may catch it."""


def step_time_ms(layout: Layout) -> float:
    """Another time for every layout; fastest at tp2 pp1 mbs4 without recompute."""
    recompute = 1.3 if layout.recompute_granularity == "full" else 1.0
    return recompute * (100 + 40 * abs(layout.tp - 2) + 25 * layout.pp + 30 / layout.micro_batch_size)


def memory_gib(layout: Layout) -> float:
    """Grows with the micro-batch, shrinks with the model's shards and with recompute."""
    recompute = 0.25 if layout.recompute_granularity == "full" else 1.0
    return (16 + 32 * layout.micro_batch_size * recompute) / (layout.tp * layout.pp)


def replayed(spec: TrialSpec, limit_gib: float) -> TrialResult:
    """What the formulas make of a layout."""
    layout, needed = spec.layout, memory_gib(spec.layout)
    finished_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=spec.number)
    ending: dict[str, Any] = {
        "durations": Durations(total_s=TRIAL_S),
        "device_name": "replay",
        "finished_at": finished_at.isoformat(timespec="seconds"),
    }
    if needed > limit_gib:
        reason = f"needs {needed:.1f} GiB of {limit_gib:.1f}"
        return TrialResult(outcome=Outcome.OOM, reason=reason, phase="memory", rank=0, **ending)
    metrics = metrics_of(step_time_ms(layout), half_interval_ms=0.1, peak_gib=needed)
    return TrialResult(outcome=Outcome.COMPLETED, reason="replayed", metrics=metrics, **ending)


Scripted = Outcome | type[KilledError]


@dataclass
class ReplayLauncher:
    """Ends every trial by the formulas, but for those whose attempts are scripted.

    Its files are those of a real launcher: the plan is the real one, the result is written beside it.
    """

    limit_gib: float = 1000.0
    script: Mapping[int, Sequence[Scripted]] = field(default_factory=dict)
    """How the launches of a trial's number end, in order; the formulas end those after them."""
    stop_at: int | None = None
    """The trial during which the user asks to stop."""
    change: Callable[[TrialSpec, TrialResult], TrialResult] | None = None
    """What becomes of the formulas' result: noise, drift, a disturbed machine."""
    launched: list[TrialSpec] = field(default_factory=list)

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """The real launcher's plan."""
        return TorchrunLauncher().plan(spec, folder, place)

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """Write what a real trial leaves, in its order."""
        folder = TrialFolder(plan.folder)
        if folder.result.exists():
            aside = next(path for n in range(1, 99) if not (path := folder.set_aside(n)).exists())
            aside.mkdir()
            folder.result.rename(aside / folder.result.name)
        folder.log.mkdir(parents=True, exist_ok=True)
        for name, text in plan.files.items():
            write_text(folder.path / name, text)
        write_json(folder.plan, plan.to_data())
        spec = parse(TrialSpec, json.loads(plan.files[folder.spec.name]), "the plan")
        earlier = sum(other.number == spec.number for other in self.launched)
        self.launched.append(spec)
        if on_heartbeat:
            on_heartbeat(Heartbeat(phase="measure", step=1, time_s=0.0))
        if spec.number == self.stop_at:
            stop.set()
        scripted = self.script.get(spec.number, ())[earlier : earlier + 1]
        if KilledError in scripted:
            raise KilledError
        result = replayed(spec, self.limit_gib)
        result = self.change(spec, result) if self.change else result
        if stop.is_set():
            scripted = [Outcome.INTERRUPTED]
        for outcome in scripted:
            assert isinstance(outcome, Outcome)
            result = replace(result, outcome=outcome, reason=f"scripted {outcome}", metrics=None)
        write_json(folder.result, result)
        return result

    @property
    def numbers(self) -> list[int]:
        """The trials' numbers, a launch each."""
        return [spec.number for spec in self.launched]

    @property
    def layouts(self) -> list[Layout]:
        """The layouts, a launch each."""
        return [spec.layout for spec in self.launched]


class Logged(Sink):
    """Remembers the numbers of the trials that it was told of, as a tracker would log them."""

    def __init__(self) -> None:
        self.logged: list[int] = []

    def opened(self, snapshot: Snapshot, table: pd.DataFrame) -> None:
        self.logged += [trial.number for trial in snapshot.state.ended]

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        self.logged.append(trial.number)


class LoggedTracker(Logged):
    """A tracker of the command line that needs no MLflow: making its store takes seconds."""

    def finish(self, summary: str, status: Status) -> None:
        """See Tracker."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


@dataclass
class Watching(Sink):
    """Remembers what it was told."""

    starts: list[tuple[int, int, str]] = field(default_factory=list)
    """Number, attempt and source."""
    endings: list[tuple[int, int]] = field(default_factory=list)
    """Number and how many rows it ruled out."""
    progress: list[Progress] = field(default_factory=list)
    beats: int = 0
    most_in_flight: int = 0

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        self.starts.append((trial.number, trial.attempt, trial.source.source))
        self.progress.append(snapshot.progress)
        self.most_in_flight = max(self.most_in_flight, len(snapshot.state.running))

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        self.beats += 1

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        self.endings.append((trial.number, pruned))
        self.progress.append(snapshot.progress)


class InlineRunner:
    """Runs trials one after the other in the caller's thread; the trial that started last ends first.

    Up to `slots` are in flight between `submit` and `next_event`.
    """

    def __init__(self, launcher: ReplayLauncher, stop: threading.Event, slots: int = 1) -> None:
        self.launcher, self.stop, self._slots = launcher, stop, slots
        self._submitted: list[tuple[TrialSpec, TrialFolder]] = []
        self._events: list[Beat | AttemptEnded] = []

    @property
    def free_slots(self) -> int:
        return self._slots - len(self._submitted) - bool(self._events)

    def submit(self, spec: TrialSpec, folder: TrialFolder) -> None:
        self._submitted.append((spec, folder))

    def next_event(self, patience_s: float) -> Beat | AttemptEnded | None:
        if not self._events:
            spec, folder = self._submitted.pop()
            plan = self.launcher.plan(spec, folder)
            beats: list[Heartbeat] = []
            result = self.launcher.run(plan, self.stop, beats.append)
            self._events = [Beat(number=spec.number, heartbeat=beat) for beat in beats]
            self._events.append(AttemptEnded(number=spec.number, result=result))
        return self._events.pop(0)

    def stop_all(self) -> None:
        self.stop.set()


def sweep_of(cluster: Cluster = CLUSTER, **keys: Any) -> Sweep:
    """A sweep of the test model, which never stops by itself; `keys` as in a sweep file."""
    data = {
        "name": "night",
        "workload": {**to_data(WORKLOAD)},
        "cluster": to_data(cluster),
        "knobs": dict(SEARCHED),
        **keys,
        "budget": {
            "trials": TRIALS,
            "min_gain": None,
            "finalists": 0,
            "canary_every": None,
            **keys.get("budget", {}),
        },
    }
    return resolve(parse(SweepFile, data, "night.yaml"), "night.yaml", Path(), lambda: cluster)


def table_of(sweep: Sweep) -> pd.DataFrame:
    """Its valid layouts, the baseline's included."""
    table = grid_space(sweep.problem).table
    return table if sweep.baseline is None else with_row(table, sweep.baseline)


def slowed(result: TrialResult, factor: float, suspicions: tuple[str, ...] = ()) -> TrialResult:
    """A result with every step longer by a factor; unchanged where nothing was measured."""
    if result.metrics is None:
        return result
    metrics = result.metrics
    times = {
        name: getattr(metrics, name) * factor
        for name in ("step_time_ms", "step_time_low_ms", "step_time_high_ms")
    }
    steps = tuple(ms * factor for ms in metrics.step_times_ms)
    return replace(result, metrics=replace(metrics, **times, step_times_ms=steps), suspicions=suspicions)


@dataclass
class ReplayedSweep:
    """A sweep as the command line makes it, around a replay."""

    controller: Controller
    runner: InlineRunner

    def run(self, stop: threading.Event | None = None) -> Stop:
        """Run it until it ends, or `stop` is set."""
        self.controller.stop = self.runner.stop = stop or threading.Event()
        return self.controller.run()

    @property
    def rows(self) -> list[FinishedTrial]:
        """The finished trials, by number."""
        return list(self.controller.state.ended)

    def progress(self) -> Progress:
        """How far it is."""
        return self.controller.progress()

    def finals_note(self) -> str | None:
        """What to say of finals that are not whole."""
        return self.controller.finals_note()


def loop_of(
    results: Path,
    launcher: ReplayLauncher,
    sweep: Sweep | None = None,
    *,
    tracker: Sink | None = None,
    observer: Watching | None = None,
    deadline_s: float | None = None,
    clock: Clock = time,
    slots: int = 1,
    with_study: bool = False,
) -> ReplayedSweep:
    """The loop of a sweep around a replay. A study costs more than all else, so that only its tests have one."""
    sweep = sweep or sweep_of()
    table, folder = table_of(sweep), SweepFolder(results)
    claim(folder, sweep)
    stop = threading.Event()
    runner = InlineRunner(launcher, stop, slots)
    sinks = [StudyProjection(folder.study, sweep.name)] if with_study else []
    controller = resumed(
        sweep,
        table=table,
        queue=queue_of(sweep.baseline, seeds(sweep.workload, sweep.cluster, table)),
        folder=folder,
        runner=runner,
        stop=stop,
        sinks=[*sinks, *(sink for sink in (tracker, observer) if sink is not None)],
        deadline_s=deadline_s,
        clock=clock,
    )
    return ReplayedSweep(controller, runner)


def snapshot_of(trials: Sequence[FinishedTrial]) -> Snapshot:
    """A sweep of these finished trials."""
    progress = Progress(
        finished=len(trials),
        budget=TRIALS,
        used_s=0.0,
        left_s=None,
        best=best_trial(trials),
        pruned=0,
        certainty=None,
    )
    return Snapshot(SweepState(ended=tuple(trials)), progress)


def claim(folder: SweepFolder, sweep: Sweep, machine: Machine | None = None) -> None:
    """Make a folder a sweep's, as a tuner does that ends at once."""
    with folder.claimed(sweep, machine):
        pass


def run_to_end(
    results: Path,
    launcher: ReplayLauncher | None = None,
    sweep: Sweep | None = None,
    *,
    with_study: bool = False,
) -> ReplayedSweep:
    """Run a sweep until it ends by itself."""
    loop = loop_of(results, launcher or ReplayLauncher(), sweep, with_study=with_study)
    loop.run()
    return loop
