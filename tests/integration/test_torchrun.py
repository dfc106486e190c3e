"""Real torchrun jobs end in every way: each gets its outcome, and none leaves a process behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.processes import marked_processes
from tests.disks import small_disk
from tests.faults import FAULTS, LIMITS, Fault, Programs, lost, spec_for, wrong
from tuner.files import read_json
from tuner.trial.contract import Heartbeat, Limits, Outcome, TrialFolder, TrialResult, TrialSpec

LAUNCHER = TorchrunLauncher(programs=Programs(), grace_s=1.0)
FORKED = {
    "exits_3",
    "exits_0",
    "is_refused",
    "runs_out_of_memory_in_backward",
    "runs_out_of_host_memory",
    "is_killed",
    "crashes",
    "kills_its_launcher",
    "turns_nan",
    "hangs_in_a_collective",
    "never_starts",
    "beats_forever",
    "leaves_grandchildren",
    "truncates_its_result",
    "corrupts_its_result",
    "fills_the_disk",
    "loses_its_rendezvous_port",
}
"""The faults that take a few seconds; tests/bench/faults.py tries all faults, with both ways of starting."""
COLD = {"is_killed", "hangs_in_a_collective", "leaves_grandchildren"}


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preload]:
    """One server for the whole file, as for a whole sweep; after the tests, nothing of it may run."""
    marker = tmp_path_factory.mktemp("sweep")
    with Preload(marker) as preload:
        yield preload
    assert marked_processes(str(marker)) == []


@pytest.fixture(params=["cold", "forked"])
def launcher(request: pytest.FixtureRequest, preload: Preload) -> Iterator[TorchrunLauncher]:
    """A launcher for each way of starting a job. No process of a forked job may run after its end."""
    yield LAUNCHER if request.param == "cold" else replace(LAUNCHER, start=preload.start)
    assert preload.jobs() == []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TrialFolder]:
    """A folder whose name a shell would take apart; after the test, no process of it may run."""
    path = tmp_path / "a 'night' of $trials"
    path.mkdir()
    yield TrialFolder(path)
    assert marked_processes(str(path)) == []


def run(
    program: str,
    folder: TrialFolder,
    limits: Limits = LIMITS,
    launcher: TorchrunLauncher = LAUNCHER,
    on_heartbeat: Callable[[Heartbeat], None] | None = None,
    stop: threading.Event | None = None,
) -> TrialResult:
    plan = launcher.plan(spec_for(program, limits), folder)
    with pytest.MonkeyPatch.context() as environment:
        # It differs from test to test, and jobs of different environments are not forked from one process.
        environment.delenv("PYTEST_CURRENT_TEST")
        result = launcher.run(plan, stop or threading.Event(), on_heartbeat)
    assert read_json(TrialResult, folder.result) == result
    assert "\n" not in result.reason
    return result


def test_a_completed_trial_keeps_its_measurement_and_gains_its_duration(
    folder: TrialFolder, launcher: TorchrunLauncher
) -> None:
    beats: list[Heartbeat] = []
    started_s = time.monotonic()
    result = run("completes", folder, launcher=launcher, on_heartbeat=beats.append)
    assert (result.outcome, result.reason) == (Outcome.COMPLETED, "measured")
    assert result.metrics is not None
    assert 0 < result.durations.total_s <= time.monotonic() - started_s
    assert [(beat.phase, beat.step) for beat in beats] == [("build", 0), ("measure", 3)]
    assert read_json(TrialSpec, folder.spec) == spec_for("completes")


def test_the_planned_command_runs_the_trial_again_without_the_tuner(folder: TrialFolder) -> None:
    run("completes", folder)
    folder.result.unlink()
    command = json.loads(folder.plan.read_text())["command"]
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=60)
    assert read_json(TrialResult, folder.result).outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [("forked", fault) for fault in FAULTS if fault.program in FORKED]
    + [("cold", fault) for fault in FAULTS if fault.program in COLD],
    indirect=["launcher"],
    ids=lambda value: value.program if isinstance(value, Fault) else value,
)
def test_a_fault_is_reported_with_its_cause_and_leaves_its_evidence_but_no_process(
    launcher: TorchrunLauncher, fault: Fault, folder: TrialFolder
) -> None:
    with ExitStack() as stack:
        if fault.needs_small_disk:
            stack.enter_context(small_disk(folder.path))
        result = run(fault.program, folder, fault.limits, launcher)
        assert wrong(fault, result) == ""
        assert lost(folder, result) == []
        assert (result.metrics is None) == (result.outcome is not Outcome.COMPLETED)
        # A timeout bounds the step time; a hang does not.
        assert (result.slower_than_ms is not None) == (result.outcome is Outcome.TIMEOUT)
        assert sum(path.stat().st_size for path in folder.log.rglob("*.log")) < 64 << 20


def test_a_program_that_cannot_be_imported_is_reported_with_the_error(folder: TrialFolder) -> None:
    launcher = TorchrunLauncher(programs={"gone": "no_such_package.program"})
    result = launcher.run(launcher.plan(spec_for("gone"), folder), threading.Event())
    assert result.outcome is Outcome.INFRASTRUCTURE
    assert "No module named 'no_such_package'" in result.reason


def test_stop_ends_the_trial_as_interrupted(folder: TrialFolder, launcher: TorchrunLauncher) -> None:
    stop = threading.Event()
    result = run("hangs", folder, launcher=launcher, on_heartbeat=lambda _: stop.set(), stop=stop)
    assert result.outcome is Outcome.INTERRUPTED
    assert result.durations.total_s < 45


def test_an_exception_in_the_tuner_still_ends_the_processes(
    folder: TrialFolder, launcher: TorchrunLauncher
) -> None:
    def fail(_: Heartbeat) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("hangs", folder, launcher=launcher, on_heartbeat=fail)
    assert marked_processes(str(folder.path)) == []


def test_processes_that_outlived_their_tuner_and_guard_are_ended_by_the_next_attempt(
    folder: TrialFolder,
) -> None:
    plan = LAUNCHER.plan(spec_for("hangs"), folder)
    code = (
        "import threading\n"
        "from tests.integration.test_torchrun import *\n"
        f"folder = TrialFolder(Path({str(folder.path)!r}))\n"
        "LAUNCHER.run(LAUNCHER.plan(spec_for('hangs'), folder), threading.Event())"
    )
    tuner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], start_new_session=True
    )
    deadline_s = time.monotonic() + 60
    while not folder.heartbeat.exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    guard = next(
        process for process in psutil.Process(tuner.pid).children() if "launchers.guard" in process.cmdline()
    )
    guard.kill()
    tuner.kill()
    tuner.wait()
    orphans = marked_processes(str(plan.folder))
    assert len(orphans) == 3  # torchrun and its two ranks
    assert set(orphans) == set(marked_processes(str(plan.folder.parent)))
    assert marked_processes(f"{plan.folder}0") == []
    assert run("completes", folder).outcome is Outcome.COMPLETED
    assert not any(orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE for orphan in orphans)


@pytest.mark.parametrize("launcher", ["forked"], indirect=True)
def test_an_earlier_attempt_is_set_aside_and_does_not_affect_the_next(
    launcher: TorchrunLauncher, folder: TrialFolder
) -> None:
    run("turns_nan", folder, launcher=launcher)
    assert run("exits_3", folder, launcher=launcher).outcome is Outcome.INFRASTRUCTURE
    earlier = TrialFolder(folder.set_aside(1))
    assert read_json(TrialResult, earlier.result).outcome is Outcome.NAN
    assert earlier.rank_record(0).exists() and earlier.log.is_dir()


@pytest.mark.parametrize("launcher", ["forked"], indirect=True)
def test_a_flood_of_output_is_cut_to_its_head_and_tail(
    launcher: TorchrunLauncher, folder: TrialFolder
) -> None:
    assert run("floods", folder, launcher=launcher).outcome is Outcome.COMPLETED
    log = next(folder.log.glob("*/attempt_0/0/stdout.log")).read_text()
    assert log.startswith("the first line") and log.endswith("the last line\n")
    assert "output cut here" in log


@pytest.mark.parametrize("launcher", ["forked"], indirect=True)
def test_nothing_hidden_is_left_in_the_folder_of_a_trial(
    launcher: TorchrunLauncher, folder: TrialFolder
) -> None:
    run("completes", folder, launcher=launcher)
    assert {path.name for path in folder.path.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("launcher", ["forked"], indirect=True)
def test_processes_of_another_trial_are_left_alone(launcher: TorchrunLauncher, folder: TrialFolder) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        run("hangs", folder, replace(LIMITS, step_s=1.0), launcher)
        assert other.poll() is None
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()


def test_a_folder_that_cannot_be_written_is_an_infrastructure_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    plan = LAUNCHER.plan(spec_for("completes"), TrialFolder(blocked))
    result = LAUNCHER.run(plan, threading.Event())
    assert result.outcome is Outcome.INFRASTRUCTURE
    assert str(blocked) in result.reason


def test_a_stop_while_the_program_is_imported_starts_no_job(folder: TrialFolder) -> None:
    stop = threading.Event()
    stop.set()
    with Preload(folder.path) as preload:
        launcher = replace(LAUNCHER, start=preload.start)
        result = launcher.run(launcher.plan(spec_for("hangs"), folder), stop)
        assert result.outcome is Outcome.INTERRUPTED
        assert marked_processes(str(folder.path)) == []
        assert run("completes", folder, launcher=launcher).outcome is Outcome.COMPLETED, "the next trial runs"
