"""Sweeps without processes, for tests: a launcher whose results are formulas of the layout, and sweeps that use it."""

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
"""The knobs of the test sweep. They give 34 valid layouts of the test model on eight GPUs: tp x pp x micro-batch size x
(nothing or everything recomputed).
"""

TRIALS = 8
"""The budget of trials of a sweep that states none."""

TRIAL_S = 60.0
"""Wall clock of every replayed trial, in seconds."""


class KilledError(BaseException):
    """Stands for the death of the tuner, as by SIGKILL; no code may catch it."""


def step_time_ms(layout: Layout) -> float:
    """Return the step time of a layout; tp 2, pp 1, micro-batch size 4 without recompute is the fastest."""
    recompute = 1.3 if layout.recompute_granularity == "full" else 1.0
    return recompute * (100 + 40 * abs(layout.tp - 2) + 25 * layout.pp + 30 / layout.micro_batch_size)


def memory_gib(layout: Layout) -> float:
    """Return the peak memory of a layout, which grows with the micro-batch and shrinks with tp, pp and recompute."""
    recompute = 0.25 if layout.recompute_granularity == "full" else 1.0
    return (16 + 32 * layout.micro_batch_size * recompute) / (layout.tp * layout.pp)


def replayed(spec: TrialSpec, limit_gib: float) -> TrialResult:
    """Return the result of a trial by the formulas; it is OOM if the layout needs more than `limit_gib`."""
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
"""The end of a launch that does not follow the formulas."""


@dataclass
class ReplayLauncher:
    """A launcher that ends every trial by the formulas, except attempts that are scripted.

    It writes the files that a real launcher writes, and its plan is that of the real launcher.
    """

    limit_gib: float = 1000.0
    """Memory of a GPU in GiB; layouts that need more end in OOM."""
    script: Mapping[int, Sequence[Scripted]] = field(default_factory=dict)
    """The ends of the first launches of a trial, by its number; later launches follow the formulas."""
    stop_at: int | None = None
    """Number of the trial during which the user asks to stop; None for no trial."""
    change: Callable[[TrialSpec, TrialResult], TrialResult] | None = None
    """Changes the result of the formulas: noise, drift, a disturbed machine."""
    launched: list[TrialSpec] = field(default_factory=list)
    """The spec of every launch so far."""

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """Return the plan of the real launcher."""
        return TorchrunLauncher().plan(spec, folder, place)

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """Write the files of a real trial, in their order, and return the result."""
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
        """The number of the trial of each launch."""
        return [spec.number for spec in self.launched]

    @property
    def layouts(self) -> list[Layout]:
        """The layout of each launch."""
        return [spec.layout for spec in self.launched]


class Logged(Sink):
    """Records the numbers of the trials that a tracker would log."""

    def __init__(self) -> None:
        self.logged: list[int] = []

    def opened(self, snapshot: Snapshot, table: pd.DataFrame) -> None:
        self.logged += [trial.number for trial in snapshot.state.ended]

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        self.logged.append(trial.number)


class LoggedTracker(Logged):
    """A tracker for the command line without MLflow, whose store takes seconds to create."""

    def finish(self, summary: str, status: Status) -> None:
        """See Tracker."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


@dataclass
class Watching(Sink):
    """Records the events of a sweep."""

    starts: list[tuple[int, int, str]] = field(default_factory=list)
    """Number, attempt and source of each attempt that began."""
    endings: list[tuple[int, int]] = field(default_factory=list)
    """Number of each trial that ended, and how many rows it ruled out."""
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
    """Return a sweep of the test model that never stops by itself; `keys` are those of a sweep file."""
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
    """Return the table of a sweep's valid layouts, the baseline included."""
    table = grid_space(sweep.problem).table
    return table if sweep.baseline is None else with_row(table, sweep.baseline)


def slowed(result: TrialResult, factor: float, suspicions: tuple[str, ...] = ()) -> TrialResult:
    """Return a result whose steps are longer by a factor; a result without metrics is returned as it is."""
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
    """A sweep as the command line makes it, but with a replay launcher."""

    controller: Controller
    runner: InlineRunner

    def run(self, stop: threading.Event | None = None) -> Stop:
        """Run the sweep until it ends or `stop` is set; return why it ended."""
        self.controller.stop = self.runner.stop = stop or threading.Event()
        return self.controller.run()

    @property
    def trials(self) -> list[FinishedTrial]:
        """The finished trials, by number."""
        return list(self.controller.state.ended)

    def progress(self) -> Progress:
        """Return how far the sweep is."""
        return self.controller.progress()

    def finals_note(self) -> str | None:
        """Return what to say if the finals are smaller than asked for or not complete; None otherwise."""
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
    """Return a sweep with a replay launcher, claimed and restored from its folder.

    A study costs more time than all else, so a sweep has one only if a test asks for it.
    """
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
    """Return the snapshot of a sweep with these finished trials."""
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
    """Claim a folder for a sweep and release it, as a tuner does that ends at once."""
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
