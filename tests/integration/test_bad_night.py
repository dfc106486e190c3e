"""What a bad night does to a running `megatune sweep`: disks that fail, terminals that go away, deadlines that pass."""

import os
import pty
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import yaml
from mlflow import MlflowClient

from launchers.processes import marked_processes
from launchers.tracking import FINISH_S
from tests.bad_nights import SWEEP, held_after_trial_0, start, wait_for
from tests.disks import delete, fill, fill_names, read_only, small_disk
from tests.replay import claim
from tuner.cli.api import load_sweep
from tuner.files import read_json, write_json
from tuner.sweep.deadline import KeptDeadline
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialResult
from tuner.trial.finished import read_trials

LONG = {"min_steps": 3000, "max_steps": 3000}
"""Measurements under which the baseline takes two minutes."""


def _ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit code of a command, and what it printed."""
    out, err = process.communicate(timeout=200)
    text = " ".join(((out or b"") + (err or b"")).decode().split())
    assert "Traceback" not in text and "internal error" not in text, text
    return process.returncode, text


def _write(folder: Path, **changes: Any) -> SweepFolder:
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))
    return SweepFolder(folder / "results" / "night")


def _goes_on(cwd: Path, folder: SweepFolder) -> None:
    """Check that the same command finishes the sweep and leaves what was measured as it is."""
    before = [trial.result for trial in read_trials(folder.path)]
    code, text = _ended(start(cwd, "sweep", "sweep.yaml"))
    assert code == 0, text
    after = [trial.result for trial in read_trials(folder.path)]
    assert len(after) == 3
    assert after[: len(before)] == before
    assert marked_processes(str(cwd)) == []


@pytest.mark.parametrize("fill_up", [fill, fill_names])
def test_a_disk_that_is_full_between_trials_ends_with_code_4_and_mlflow_is_told(
    tmp_path: Path, fill_up: Callable[[Path], None]
) -> None:
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    folder = _write(tmp_path, tracking={"uri": elsewhere})
    (tmp_path / "results").mkdir()
    with small_disk(tmp_path / "results", size="32m"):
        tuner = start(tmp_path, "sweep", "sweep.yaml")
        with held_after_trial_0(folder, tuner):
            fill_up(tmp_path / "results")
        code, text = _ended(tuner)
        assert code == 4, text
        assert "No space left on device" in text
        assert "error: 3 infrastructure failures in a row" in text
        assert "go on with: megatune sweep sweep.yaml" in text
        assert "No space left on device" in (folder.path / "summary.md").read_text(), "room was kept for it"
        if f"it took longer than {FINISH_S:g} s" in text:  # a loaded machine
            assert _ended(start(tmp_path, "sync", "night", "--uri", elsewhere))[0] == 0
        client = MlflowClient(tracking_uri=elsewhere)
        (experiment,) = client.search_experiments(filter_string="name LIKE 'megatune/%'")
        (run,) = client.search_runs([experiment.experiment_id], "tags.`megatune.kind` = 'sweep'")
        assert run.info.status == "FAILED", text
        code, text = _ended(start(tmp_path, "sweep", "sweep.yaml"))
        assert code == 4, text
        assert "error: results/night" in text and "No space left on device" in text
        for filler in (tmp_path / "results").glob("filler*"):
            shutil.rmtree(filler) if filler.is_dir() else filler.unlink()
        _goes_on(tmp_path, folder)


def test_a_results_folder_that_is_deleted_ends_with_code_4(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    tuner = start(tmp_path, "sweep", "sweep.yaml")
    with held_after_trial_0(folder, tuner):
        delete(folder.path)
    code, text = _ended(tuner)
    assert code == 4, text
    assert "No such file or directory" in text
    assert not folder.trials.exists(), "what is left would not be the sweep"
    assert marked_processes(str(tmp_path)) == []


def test_a_results_folder_that_becomes_read_only_ends_with_code_4(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    tuner = start(tmp_path, "sweep", "sweep.yaml")
    with held_after_trial_0(folder, tuner):
        context = read_only(folder.path)
        context.__enter__()
    try:
        code, text = _ended(tuner)
    finally:
        context.__exit__(None, None, None)
    assert code == 4, text
    assert "Read-only file system" in text
    _goes_on(tmp_path, folder)


def test_a_tuner_leaves_a_folder_that_another_tuner_has_made_anew(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    tuner = start(tmp_path, "sweep", "sweep.yaml")
    with held_after_trial_0(folder, tuner):
        delete(folder.path)
        other = start(tmp_path, "sweep", "sweep.yaml")
        wait_for(folder.trial(0).spec, other)
    code, text = _ended(other)
    assert code == 0, text
    assert [trial.number for trial in read_trials(folder.path)] == [0, 1, 2]
    code, text = _ended(tuner)
    assert code == 4, text
    assert "the folder was deleted and made anew" in text


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("lock", 4, "lock: Is a directory"),
        ("request.json", 4, "request.json: Is a directory"),
        ("mlflow.log", 4, "mlflow.log: Is a directory"),
        ("study.db", 0, "study.db: cannot be written"),
        ("summary.md", 0, "summary.md: cannot be written"),
        ("status.json", 0, ""),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_named_and_no_view_stops_the_sweep(
    tmp_path: Path, name: str, code: int, told: str
) -> None:
    folder = _write(tmp_path, budget={**SWEEP["budget"], "trials": 1})
    (folder.path / name).mkdir(parents=True)
    (folder.path / name / "file").touch()
    ended, text = _ended(start(tmp_path, "sweep", "sweep.yaml"))
    assert ended == code, text
    assert told in text


def _full(folder: Path) -> Mapping[str, Any]:
    full = Path("/dev/full").open("wb")  # noqa: SIM115 (the child has its own)
    return {"stdout": full, "stderr": full}


def _closed(folder: Path) -> Mapping[str, Any]:
    def close() -> None:
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    return {"stdout": None, "stderr": None, "preexec_fn": close}


def _without_reader(folder: Path) -> Mapping[str, Any]:
    reader, writer = os.pipe()
    os.close(reader)
    return {"stdout": writer, "stderr": writer}


@pytest.mark.parametrize("streams", [_full, _closed, _without_reader])
def test_a_broken_stdout_and_stderr_do_not_end_a_sweep_nor_change_its_exit_code(
    tmp_path: Path, streams: Callable[[Path], Mapping[str, Any]]
) -> None:
    folder = _write(tmp_path)
    assert start(tmp_path, "sweep", "sweep.yaml", **streams(tmp_path)).wait(timeout=200) == 0
    assert len(read_trials(folder.path)) == 3
    assert "Finished" in (folder.path / "summary.md").read_text()
    out, _ = start(tmp_path, "show", "night", "--json").communicate(timeout=60)
    assert out.startswith(b"{"), "no file took the place of a closed stream"


def test_a_reader_that_takes_one_line_does_not_end_a_sweep(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    tuner = start(tmp_path, "sweep", "sweep.yaml", stderr=subprocess.STDOUT)
    assert tuner.stdout is not None
    assert tuner.stdout.readline().startswith(b"night: ")
    tuner.stdout.close()
    assert tuner.wait(timeout=200) == 0
    assert len(read_trials(folder.path)) == 3


@contextmanager
def _terminal() -> Iterator[tuple[int, BinaryIO]]:
    """A terminal: its master's descriptor, and its other side as a file."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "wb", buffering=0) as file:
        yield master, file


def test_a_terminal_that_goes_away_without_a_signal_does_not_end_a_sweep(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    with _terminal() as (master, slave):
        # In a session of its own, without a terminal that controls it, as after `disown`.
        tuner = start(tmp_path, "sweep", "sweep.yaml", stdout=slave, stderr=slave, start_new_session=True)
    wait_for(folder.trial(0).heartbeat, tuner)
    os.close(master)
    assert tuner.wait(timeout=200) == 0
    assert len(read_trials(folder.path)) == 3


def test_a_terminal_that_hangs_up_interrupts_the_sweep_which_then_goes_on(tmp_path: Path) -> None:
    folder = _write(tmp_path, measurement=LONG)
    with _terminal() as (master, slave):
        tuner = start(
            tmp_path,
            *("sweep", "sweep.yaml"),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: os.close(
                os.open(os.ttyname(0), os.O_RDWR)
            ),  # takes it as controlling terminal
        )
    wait_for(folder.trial(0).heartbeat, tuner)
    os.close(master)
    assert tuner.wait(timeout=60) == 130
    assert read_json(TrialResult, folder.trial(0).result).outcome is Outcome.INTERRUPTED
    assert marked_processes(str(tmp_path)) == []


def test_sighup_ends_the_running_trial_and_says_how_to_resume(tmp_path: Path) -> None:
    folder = _write(tmp_path, measurement=LONG)
    tuner = start(tmp_path, "sweep", "sweep.yaml")
    wait_for(folder.trial(0).heartbeat, tuner)
    tuner.send_signal(signal.SIGHUP)
    code, text = _ended(tuner)
    assert code == 130, text
    assert "SIGHUP: ending the running trial; everything measured is kept" in text
    assert "go on with: megatune sweep sweep.yaml" in text
    assert read_json(TrialResult, folder.trial(0).result).outcome is Outcome.INTERRUPTED
    assert marked_processes(str(tmp_path)) == []


def test_under_nohup_a_sweep_outlives_sighup(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    tuner = start(
        tmp_path, "sweep", "sweep.yaml", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for(folder.trial(0).heartbeat, tuner)
    tuner.send_signal(signal.SIGHUP)
    code, text = _ended(tuner)
    assert code == 0, text
    assert len(read_trials(folder.path)) == 3


def test_a_deadline_holds_until_another_one_is_given(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    code, text = _ended(start(tmp_path, "sweep", "sweep.yaml", "--max-trials", "1", "--deadline", "07:00"))
    assert code == 0, text
    kept = folder.read_deadline()
    assert kept is not None and kept.asked == "07:00"
    assert f"to end by {kept}" in text
    # The night has passed.
    write_json(folder.deadline, KeptDeadline(asked="07:00", at="2026-01-02T07:00:00+01:00"))
    for arguments in ([], ["--deadline", "07:00"]):
        code, text = _ended(start(tmp_path, "sweep", "sweep.yaml", *arguments))
        assert code == 0, text
        assert "to end by 2026-01-02 07:00+01:00" in text
        assert "The deadline of this sweep has passed, so no further trial begins." in text
        assert "Go on until another deadline: megatune sweep sweep.yaml --deadline 20" in text
        assert len(read_trials(folder.path)) == 1
    again = text.split("megatune sweep sweep.yaml --deadline ")[1].split()[0]
    code, text = _ended(start(tmp_path, "sweep", "sweep.yaml", "--deadline", again))
    assert code == 0, text
    assert len(read_trials(folder.path)) == 3


@pytest.mark.parametrize("arguments", [["show", "night"], ["show", "night", "--json"], ["--help"]])
def test_a_reading_command_ends_quietly_with_its_reader(tmp_path: Path, arguments: list[str]) -> None:
    claim(_write(tmp_path), load_sweep(tmp_path / "sweep.yaml"))
    reader, writer = os.pipe()
    os.close(reader)
    process = start(tmp_path, *arguments, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_an_export_that_cannot_be_written_fails(tmp_path: Path) -> None:
    claim(_write(tmp_path), load_sweep(tmp_path / "sweep.yaml"))
    with Path("/dev/full").open("wb") as full:
        code, text = _ended(start(tmp_path, "show", "night", stdout=full))
    assert code == 4
    assert "No space left on device" in text
