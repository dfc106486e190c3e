"""What a running sweep says of itself, and what can be asked of it, through files in its folder."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.replay import InlineRunner, ReplayLauncher, Watching, loop_of, run_to_end, sweep_of
from tuner.report.status import status_lines
from tuner.sweep.budget import Stop
from tuner.sweep.folder import SweepFolder
from tuner.sweep.lock import Holder
from tuner.sweep.requests import Wish, ask, take_request
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.state import RunningTrial
from tuner.sweep.status import Status, StatusFile, read_status
from tuner.trial.contract import Heartbeat
from tuner.trial.finished import FinishedTrial

SWEEP = sweep_of(budget={"trials": 4})
HOLDER = Holder(user="me", host="here", pid=7, since="2026-01-01T00:00:00+00:00", started_s=0.0)


@dataclass
class Reading(Sink):
    """Reads the status file whenever a trial begins or ends, behind the sink that writes it."""

    folder: SweepFolder
    begun_as: list[Status] = field(default_factory=list)
    ended_as: list[Status] = field(default_factory=list)
    act: Callable[[int], None] = lambda number: None

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        self.begun_as.append(self._read())
        self.act(trial.number)

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        self.ended_as.append(self._read())

    def _read(self) -> Status:
        status = read_status(self.folder)
        assert status is not None
        return status


def when_second_begins(folder: SweepFolder, wish: Wish) -> Callable[[int], None]:
    """Ask for something while trial 1 runs."""

    def act(number: int) -> None:
        if number == 1:
            ask(folder, wish)

    return act


def watched(results: Path, act: Callable[[int], None] = lambda number: None) -> tuple[Stop, Reading]:
    """Run a sweep with a status file; `act` is called with the number of each trial that begins."""
    folder = SweepFolder(results)
    loop = loop_of(results, ReplayLauncher(), SWEEP, observer=Watching())
    reading = Reading(folder, act=act)
    loop.controller.sinks = [StatusFile(folder, world_size=8, near=0.05, clock_s=lambda: 60.0), reading]
    return loop.run(), reading


def test_while_a_trial_runs_the_status_names_it_and_afterwards_counts_it(results: Path) -> None:
    reason, reading = watched(results)
    assert reason is Stop.TRIALS
    assert [[trial.number for trial in status.running] for status in reading.begun_as] == [[0], [1], [2], [3]]
    assert [status.finished for status in reading.begun_as] == [0, 1, 2, 3]
    assert [status.finished for status in reading.ended_as] == [1, 2, 3, 4]
    last = reading.ended_as[-1]
    assert last.running == ()
    assert last.budget == 4
    assert last.used_gpu_hours == pytest.approx(4 * 60 * 8 / 3600)
    assert last.best is not None
    assert last.certainty is not None
    closed = read_status(SweepFolder(results))
    assert closed is not None
    assert closed.ended == Stop.TRIALS.value


def test_a_sweep_without_a_tuner_has_no_status(results: Path) -> None:
    run_to_end(results, sweep=SWEEP)
    assert read_status(SweepFolder(results)) is None


def test_a_status_that_cannot_be_read_counts_as_none(results: Path) -> None:
    watched(results)
    folder = SweepFolder(results)
    folder.status.write_text('{"halt": "running"}')
    assert read_status(folder) is None


def test_a_heartbeat_shows_within_a_second(results: Path) -> None:
    folder, now_s = SweepFolder(results), [100.0]
    sink = StatusFile(folder, world_size=8, near=0.05, clock_s=lambda: now_s[0])
    loop = loop_of(results, ReplayLauncher(), sweep_of(budget={"trials": 6}))
    steps: list[int] = []

    class Beating(Sink):
        def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
            for step in (1, 2):
                sink.heartbeat(trial.number, Heartbeat(phase="measure", step=step, time_s=0.0))
                now_s[0] += 1.0
            status = read_status(folder)
            assert status is not None
            steps.append(status.running[0].step)

    loop.controller.sinks = [sink, Beating()]
    loop.run()
    assert steps == [2] * 6


@pytest.mark.parametrize(("wish", "finished"), [("stop_after_this_trial", 2), ("stop", 1)])
def test_a_stop_that_is_asked_for_ends_the_sweep(results: Path, wish: Wish, finished: int) -> None:
    folder = SweepFolder(results)
    reason, reading = watched(results, act=when_second_begins(folder, wish))
    assert reason is Stop.INTERRUPTED
    assert len(reading.ended_as) == finished
    assert not folder.request.exists()
    status = read_status(folder)
    assert status is not None
    assert status.ended == Stop.INTERRUPTED.value


def test_a_paused_sweep_starts_nothing_until_it_is_resumed(results: Path) -> None:
    folder = SweepFolder(results)

    class Patient(InlineRunner):
        """Asks to go on when the sweep waits although nothing runs."""

        idle = 0

        def next_event(self, patience_s: float):  # type: ignore[no-untyped-def]  # as InlineRunner's
            if self.free_slots:
                self.idle += 1
                status = read_status(folder)
                assert status is not None
                assert status.halt.startswith("paused")
                if self.idle == 3:
                    ask(folder, "resume")
                return None
            return super().next_event(patience_s)

    loop = loop_of(results, ReplayLauncher(), SWEEP)
    runner = Patient(ReplayLauncher(), threading.Event())
    reading = Reading(folder, act=when_second_begins(folder, "pause"))
    loop.controller.sinks = [StatusFile(folder, world_size=8, near=0.05), reading]
    loop.controller.runner = loop.runner = runner
    assert loop.run() is Stop.TRIALS
    assert runner.idle == 3
    assert [status.finished for status in reading.ended_as] == [1, 2, 3, 4]


def test_a_request_is_taken_once_and_one_that_cannot_be_read_is_removed(results: Path) -> None:
    run_to_end(results, sweep=SWEEP)
    folder = SweepFolder(results)
    asked = ask(folder, "pause")
    assert take_request(folder) == asked
    assert take_request(folder) is None
    folder.request.write_text("{")
    assert take_request(folder) is None
    assert not folder.request.exists()


def test_the_lines_say_what_runs_or_that_the_tuner_was_killed(results: Path) -> None:
    _, reading = watched(results)
    running = reading.begun_as[2]
    lines = status_lines(running, HOLDER)
    assert "me on here, process 7" in lines[0]
    assert lines[1].startswith("  trial 2 [")
    assert "2/4 trials | best " in lines[2]
    assert "was killed" in status_lines(running, None)[0]
    closed = read_status(SweepFolder(results))
    assert closed is not None
    assert status_lines(closed, None) == []
