"""Real torchrun jobs that end in every way: each gets its outcome, and none leaves a process behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launchers.base import marked_processes
from launchers.preloaded import Preload
from launchers.torchrun import TorchrunLauncher
from tests.trials import CLUSTER, spec_of
from tuner.files import read_json
from tuner.layout import Layout
from tuner.trial import Heartbeat, Limits, Outcome, TrialFolder, TrialResult, TrialSpec

ENDINGS = "tests.integration.programs.endings"
LIMITS = Limits(startup_s=50.0, step_s=50.0, trial_s=60.0)
CPU = replace(CLUSTER, device="cpu", gpus_per_node=2, nvlink_domain_gpus=2)


class Programs(dict[str, str]):
    """Every program is the one that ends as its name says."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return ENDINGS


# On a busy machine torchrun needs seconds to end the other ranks; killed, they would seem to have died of that.
LAUNCHER = TorchrunLauncher(programs=Programs(), grace_s=5.0)


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preload]:
    """One process for the whole file, as for a whole sweep; after it, nothing of it may live."""
    marker = tmp_path_factory.mktemp("sweep")
    with Preload(marker) as preload:
        yield preload
    assert marked_processes(str(marker)) == []


@pytest.fixture(params=["cold", "forked"])
def launcher(request: pytest.FixtureRequest, preload: Preload) -> Iterator[TorchrunLauncher]:
    """Both ways to start a job. A forked one has left no process when it ends."""
    yield LAUNCHER if request.param == "cold" else replace(LAUNCHER, start=preload.start)
    assert preload.jobs() == []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TrialFolder]:
    """A folder whose name a shell would take apart; after the test, no process of it may live."""
    path = tmp_path / "a 'night' of $trials"
    path.mkdir()
    yield TrialFolder(path)
    assert marked_processes(str(path)) == []


def spec_for(program: str, limits: Limits = LIMITS) -> TrialSpec:
    return replace(spec_of(0, Layout(), cluster=CPU), program=program, limits=limits)


def run(
    program: str, folder: TrialFolder, limits: Limits = LIMITS, launcher: TorchrunLauncher = LAUNCHER
) -> TrialResult:
    result = launcher.run(launcher.plan(spec_for(program, limits), folder), threading.Event())
    assert read_json(TrialResult, folder.result) == result
    assert "\n" not in result.reason
    return result


def test_a_completed_trial_keeps_its_measurement_and_gains_its_duration(
    folder: TrialFolder, launcher: TorchrunLauncher
) -> None:
    beats: list[Heartbeat] = []
    started_s = time.monotonic()
    result = launcher.run(launcher.plan(spec_for("completes"), folder), threading.Event(), beats.append)
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
    ("program", "outcome", "phase", "rank", "reason"),
    [
        ("runs_out_of_memory", Outcome.OOM, "warmup", 1, "Tried to allocate 2.00 GiB"),
        ("is_refused", Outcome.INVALID, "build", 1, "hidden_size must be a multiple of tp"),
        ("turns_nan", Outcome.NAN, "warmup", 0, "loss is nan at step 2"),
        ("exits_3", Outcome.INFRASTRUCTURE, "startup", 1, "rank 1 ended with exit code 3"),
        ("completes_and_exits_3", Outcome.INFRASTRUCTURE, "measure", 1, "rank 1 ended with exit code 3"),
        ("is_killed", Outcome.INFRASTRUCTURE, "startup", 1, "rank 1 died in startup of SIGKILL"),
        ("crashes", Outcome.INFRASTRUCTURE, "startup", 1, "rank 1 died in startup of SIGSEGV"),
        ("writes_garbage", Outcome.INFRASTRUCTURE, "startup", None, "result.json: is not JSON"),
    ],
)
def test_a_failed_trial_is_told_by_its_cause(
    program: str,
    outcome: Outcome,
    phase: str,
    rank: int | None,
    reason: str,
    folder: TrialFolder,
    launcher: TorchrunLauncher,
) -> None:
    result = run(program, folder, launcher=launcher)
    assert (result.outcome, result.phase, result.rank) == (outcome, phase, rank)
    assert reason in result.reason
    assert result.metrics is None
    _, named, log = result.reason.rpartition(" (log: ")
    assert named == (" (log: " if program != "writes_garbage" else "")
    assert not named or (folder.path / log.rstrip(")")).is_file()


def test_a_program_that_cannot_be_imported_is_told_in_its_own_words(folder: TrialFolder) -> None:
    launcher = TorchrunLauncher(programs={"gone": "no_such_package.program"})
    result = launcher.run(launcher.plan(spec_for("gone"), folder), threading.Event())
    assert result.outcome is Outcome.INFRASTRUCTURE
    assert "No module named 'no_such_package'" in result.reason


@pytest.mark.parametrize(
    ("program", "limits", "outcome", "limit"),
    [
        ("hangs", replace(LIMITS, step_s=1.0), Outcome.HANG, "limits.step_s"),
        ("never_starts", replace(LIMITS, startup_s=5.0), Outcome.HANG, "limits.startup_s"),
        ("beats_forever", replace(LIMITS, trial_s=6.0), Outcome.TIMEOUT, "limits.trial_s"),
    ],
)
def test_a_trial_over_its_limit_is_ended(
    program: str,
    limits: Limits,
    outcome: Outcome,
    limit: str,
    folder: TrialFolder,
    launcher: TorchrunLauncher,
) -> None:
    result = run(program, folder, limits, launcher)
    assert result.outcome is outcome
    assert limit in result.reason
    assert result.durations.total_s < 45
    # A timeout bounds the step time; a hang says nothing of it.
    assert (result.slower_than_ms is not None) == (outcome is Outcome.TIMEOUT)


def test_a_grandchild_that_left_the_session_and_ignores_sigterm_is_ended(
    folder: TrialFolder, launcher: TorchrunLauncher
) -> None:
    assert run("leaves_a_grandchild", folder, launcher=launcher).outcome is Outcome.COMPLETED


def test_stop_ends_the_trial_as_interrupted(folder: TrialFolder, launcher: TorchrunLauncher) -> None:
    stop = threading.Event()
    result = launcher.run(launcher.plan(spec_for("hangs"), folder), stop, lambda _: stop.set())
    assert result.outcome is Outcome.INTERRUPTED
    assert result.durations.total_s < 45


def test_an_exception_in_the_tuner_still_ends_the_processes(
    folder: TrialFolder, launcher: TorchrunLauncher
) -> None:
    def fail(_: Heartbeat) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.run(launcher.plan(spec_for("hangs"), folder), threading.Event(), fail)
    assert marked_processes(str(folder.path)) == []


def test_what_a_killed_tuner_left_running_is_ended_by_the_next_attempt(folder: TrialFolder) -> None:
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
    tuner.kill()
    tuner.wait()
    orphans = marked_processes(str(plan.folder))
    assert len(orphans) == 3  # torchrun and its two ranks
    assert set(orphans) == set(marked_processes(str(plan.folder.parent)))
    assert marked_processes(f"{plan.folder}0") == []
    assert run("completes", folder).outcome is Outcome.COMPLETED
    assert not any(orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE for orphan in orphans)


def test_an_earlier_attempt_is_set_aside_and_does_not_speak_for_the_next(folder: TrialFolder) -> None:
    run("runs_out_of_memory", folder)
    assert run("exits_3", folder).outcome is Outcome.INFRASTRUCTURE
    earlier = TrialFolder(folder.set_aside(1))
    assert read_json(TrialResult, earlier.result).outcome is Outcome.OOM
    assert earlier.rank_record(1).exists() and earlier.log.is_dir()


def test_a_flood_of_output_is_cut_to_its_head_and_tail(
    folder: TrialFolder, launcher: TorchrunLauncher
) -> None:
    assert run("floods", folder, launcher=launcher).outcome is Outcome.COMPLETED
    size = sum(path.stat().st_size for path in folder.log.rglob("*.log"))
    assert size < 100 << 20
    log = next(folder.log.glob("*/attempt_0/0/stdout.log")).read_text()
    assert log.startswith("the first line") and log.endswith("the last line\n")
    assert "output cut here" in log


def test_processes_of_another_trial_are_left_alone(folder: TrialFolder) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        run("hangs", folder, replace(LIMITS, step_s=1.0))
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


def test_the_jobs_of_a_killed_tuner_end_with_the_process_they_were_forked_from(folder: TrialFolder) -> None:
    code = (
        "import threading\n"
        "from tests.integration.test_torchrun import *\n"
        f"folder = TrialFolder(Path({str(folder.path)!r}))\n"
        "launcher = replace(LAUNCHER, start=Preload(folder.path).start)\n"
        "launcher.run(launcher.plan(spec_for('hangs'), folder), threading.Event())"
    )
    tuner = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline_s = time.monotonic() + 60
    while not folder.heartbeat.exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert len(marked_processes(str(folder.path))) >= 4  # the parent, torchrun's agent and its two ranks
    tuner.kill()
    tuner.wait()
    deadline_s = time.monotonic() + 10
    while marked_processes(str(folder.path)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert marked_processes(str(folder.path)) == []


def test_a_stop_while_the_program_is_imported_starts_no_job(folder: TrialFolder) -> None:
    stop = threading.Event()
    stop.set()
    with Preload(folder.path) as preload:
        launcher = replace(LAUNCHER, start=preload.start)
        result = launcher.run(launcher.plan(spec_for("hangs"), folder), stop)
        assert result.outcome is Outcome.INTERRUPTED
        assert marked_processes(str(folder.path)) == []
        assert run("completes", folder, launcher=launcher).outcome is Outcome.COMPLETED, "the next one runs"
