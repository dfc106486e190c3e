"""Trials in threads: each ends with one event, all end when they are stopped, and a crash reaches the caller."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.replay import replayed
from tests.trials import spec_of
from tuner.core.layout import Layout
from tuner.sweep.runner import AttemptEnded, Beat, ThreadRunner
from tuner.trial.contract import Heartbeat, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.launcher import WHOLE_MACHINE, LaunchPlan, Place

TWO = (Place(gpus=(0,)), Place(gpus=(1,)))


@dataclass
class GatedLauncher:
    """Runs a trial until its gate opens or it is stopped."""

    gates: dict[str, threading.Event] = field(default_factory=dict)
    crashes: bool = False

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        self.gates[folder.path.name] = threading.Event()
        return LaunchPlan(
            folder=folder.path, world_size=8, argv=(str(place.gpus),), env={}, files={}, limits=spec.limits
        )

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        if self.crashes:
            raise OSError("no such launcher")
        if on_heartbeat:
            on_heartbeat(Heartbeat(phase="measure", step=1, time_s=0.0))
        gate = self.gates[plan.folder.name]
        while not gate.wait(0.001):
            if stop.is_set():
                return TrialResult(outcome=Outcome.INTERRUPTED, reason="stopped")
        return replayed(spec_of(0, Layout()), limit_gib=1000.0)


def folder(number: int) -> TrialFolder:
    return TrialFolder(Path(f"t{number:04d}"))


def spec(number: int) -> TrialSpec:
    return spec_of(number, Layout())


def next_ending(runner: ThreadRunner) -> AttemptEnded:
    while True:
        event = runner.next_event(10.0)
        assert event is not None, "no trial ended"
        if isinstance(event, AttemptEnded):
            return event


def test_two_trials_run_at_once_each_in_its_place_and_end_in_any_order() -> None:
    launcher, stop = GatedLauncher(), threading.Event()
    with ThreadRunner(launcher, stop, TWO) as runner:
        runner.submit(spec(0), folder(0))
        runner.submit(spec(1), folder(1))
        assert runner.free_slots == 0
        beats = [runner.next_event(10.0), runner.next_event(10.0)]
        assert {beat.number for beat in beats if isinstance(beat, Beat)} == {0, 1}
        assert runner.next_event(0.0) is None
        launcher.gates["t0001"].set()
        ended = next_ending(runner)
        assert (ended.number, ended.result.outcome) == (1, Outcome.COMPLETED)
        assert runner.free_slots == 1
        launcher.gates["t0000"].set()
        assert next_ending(runner).number == 0
    assert runner.free_slots == 2


def test_a_stop_ends_every_running_trial_as_interrupted() -> None:
    stop = threading.Event()
    with ThreadRunner(GatedLauncher(), stop, TWO) as runner:
        runner.submit(spec(0), folder(0))
        runner.submit(spec(1), folder(1))
        runner.stop_all()
        endings = [next_ending(runner), next_ending(runner)]
        assert {ended.number for ended in endings} == {0, 1}
        assert {ended.result.outcome for ended in endings} == {Outcome.INTERRUPTED}


def test_no_trial_outlives_the_runner() -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ThreadRunner(GatedLauncher(), threading.Event(), TWO) as runner:
        runner.submit(spec(0), folder(0))
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_what_a_launcher_raises_reaches_the_caller() -> None:
    with ThreadRunner(GatedLauncher(crashes=True), threading.Event()) as runner:
        runner.submit(spec(0), folder(0))
        with pytest.raises(OSError, match="no such launcher"):
            runner.next_event(10.0)
