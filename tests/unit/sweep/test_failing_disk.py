"""A disk that fails between two trials is a failure of the machine: it is tried again, and nothing measured is lost."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.disks import fill, fill_names, read_only, small_disk
from tests.replay import ReplayLauncher, Watching, loop_of, run_to_end, sweep_of
from tuner.errors import InputError
from tuner.files import write_text
from tuner.sweep.budget import Stop
from tuner.sweep.folder import SweepFolder
from tuner.sweep.lock import hold
from tuner.sweep.requests import ask, take_request
from tuner.sweep.reserve import make_room, reserved
from tuner.sweep.sinks import Snapshot
from tuner.sweep.state import FAILURES_TO_STOP
from tuner.trial.contract import TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, read_trials

SWEEP = sweep_of(budget={"trials": 4})


@dataclass
class After(Watching):
    """Acts when trial 1 has ended."""

    act: Callable[[], object] = field(default=lambda: None)

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        if trial.number == 1:
            self.act()


class Recovering(threading.Event):
    """The event of a sweep that was never stopped; acts as soon as the sweep waits."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def wait(self, timeout: float | None = None) -> bool:
        self._act()
        return super().wait(timeout)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """The path of a results folder on a small disk."""
    with small_disk(tmp_path, names=200):
        yield tmp_path / "night"


def layouts(results: Path) -> list[str]:
    return [trial.layout.label() for trial in read_trials(results)]


@pytest.mark.parametrize("fill_up", [fill, fill_names])
def test_a_full_disk_between_trials_stops_the_sweep_which_then_goes_on(
    small: Path, results: Path, fill_up: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    launcher = ReplayLauncher()
    loop = loop_of(small, launcher, SWEEP, observer=After(act=lambda: fill_up(small.parent)))
    assert loop.run() is Stop.BREAKER
    assert launcher.numbers == [0, 1]
    assert caplog.text.count("trial 2 cannot begin in") == FAILURES_TO_STOP
    assert "No space left on device" in loop.controller.state.last_failure
    for filler in small.parent.glob("filler*"):
        shutil.rmtree(filler) if filler.is_dir() else filler.unlink()
    run_to_end(small, launcher, SWEEP)
    assert launcher.numbers == [0, 1, 2, 3]
    assert layouts(small) == layouts(run_to_end(results, ReplayLauncher(), SWEEP).controller.folder.path)


def test_a_disk_that_recovers_does_not_stop_the_sweep(small: Path) -> None:
    launcher, filler = ReplayLauncher(), small.parent / "filler"
    loop = loop_of(small, launcher, SWEEP, observer=After(act=lambda: fill(small.parent)))
    assert loop.run(Recovering(filler.unlink)) is Stop.TRIALS
    assert launcher.numbers == [0, 1, 2, 3]


def test_a_results_folder_that_is_deleted_stops_the_sweep_and_is_not_begun_anew(results: Path) -> None:
    launcher = ReplayLauncher()
    loop = loop_of(results, launcher, SWEEP, observer=After(act=lambda: shutil.rmtree(results)))
    assert loop.run() is Stop.BREAKER
    assert launcher.numbers == [0, 1]
    assert not results.exists()


def test_trials_that_are_deleted_stop_the_sweep(results: Path) -> None:
    trials = SweepFolder(results).trials
    loop = loop_of(results, ReplayLauncher(), SWEEP, observer=After(act=lambda: shutil.rmtree(trials)))
    assert loop.run() is Stop.BREAKER
    assert not trials.exists(), "a folder with a gap in its numbers could not be resumed"


def test_a_results_folder_that_becomes_read_only_stops_the_sweep(tmp_path: Path) -> None:
    results, launcher = tmp_path / "night", ReplayLauncher()
    context = read_only(results)
    loop = loop_of(results, launcher, SWEEP, observer=After(act=context.__enter__))
    try:
        assert loop.run() is Stop.BREAKER
    finally:
        context.__exit__(None, None, None)
    assert launcher.numbers == [0, 1]
    run_to_end(results, launcher, SWEEP)
    assert launcher.numbers == [0, 1, 2, 3]


def test_a_claim_ends_where_the_folder_is_deleted_or_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as check:
        check()
        path.unlink()
        with pytest.raises(FileNotFoundError):
            check()
        path.touch()
        with pytest.raises(OSError, match="deleted and made anew"):
            check()


def test_a_sweep_whose_claim_has_ended_writes_nothing_into_the_folder(results: Path) -> None:
    launcher = ReplayLauncher()
    loop = loop_of(results, launcher, SWEEP)

    def check() -> None:
        raise OSError("another tuner has it")

    loop.controller.check_claim = check
    assert loop.run() is Stop.BREAKER
    assert launcher.launched == []
    assert list(SweepFolder(results).trials.iterdir()) == []


def test_a_result_that_the_launcher_could_not_write_is_written_before_the_next_trial(results: Path) -> None:
    folder = SweepFolder(results)
    first = folder.trial(1).result
    unwritten = After(act=first.unlink)
    seen: list[bool] = []

    def look(spec: TrialSpec, result: TrialResult) -> TrialResult:
        seen.append(first.exists())
        return result

    loop_of(results, ReplayLauncher(change=look), SWEEP, observer=unwritten).run()
    assert seen == [False, False, True, True]
    assert [trial.number for trial in read_trials(results)] == [0, 1, 2, 3]


def test_a_result_that_cannot_be_written_at_all_is_measured_again(
    results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SweepFolder(results)

    def put_a_folder_in_its_place() -> None:
        folder.trial(1).result.unlink()
        shutil.rmtree(folder.trial(1).path)
        write_text(folder.trial(1).path, "no folder")

    loop = loop_of(results, ReplayLauncher(), SWEEP, observer=After(act=put_a_folder_in_its_place))
    assert loop.run() is Stop.BREAKER
    assert "the result of t0001 cannot be written" in caplog.text
    assert [trial.number for trial in loop.trials] == [0, 1]


def test_what_a_sweep_keeps_free_is_enough_for_its_end(small: Path) -> None:
    small.mkdir()
    with reserved(small):
        fill(small.parent)
        with pytest.raises(OSError, match="No space left"):
            write_text(small / "summary.md", "text")
        make_room(small)
        write_text(small / "summary.md", "text" * 1000)
        write_text(small / "status.json", "text" * 1000)
        write_text(small / "mlflow.json", "text" * 1000)
    assert sorted(path.name for path in small.iterdir()) == ["mlflow.json", "status.json", "summary.md"]


def test_a_sweep_does_not_begin_without_room_for_its_end(small: Path) -> None:
    small.mkdir()
    fill(small.parent)
    with pytest.raises(OSError, match="No space left"), SweepFolder(small).claimed(SWEEP):
        pass
    assert not list(small.glob(".reserve*"))


def test_a_request_that_cannot_be_removed_is_not_taken(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    ask(folder, "pause")
    with read_only(tmp_path):
        assert take_request(folder) is None
    request = take_request(folder)
    assert request is not None and request.wish == "pause"
    folder.request.mkdir()
    assert take_request(folder) is None


def test_a_folder_in_the_place_of_the_lock_file_is_named(tmp_path: Path) -> None:
    SweepFolder(tmp_path).lock.mkdir()
    with pytest.raises(OSError, match="lock") as told, SweepFolder(tmp_path).claimed(SWEEP):
        pass
    assert not isinstance(told.value, InputError)
