"""Faults that fall on a whole `megatune sweep`: how it must end, and that the same command then finishes it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from launchers.processes import marked_processes
from tests.disks import delete, fill, fill_names, read_only, small_disk
from tuner.sweep.folder import SweepFolder
from tuner.trial.finished import read_trials

ROOT = Path(__file__).parents[1]
TRIALS = 3
SWEEP: Mapping[str, Any] = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 64, "global_batch_size": 4, "precision": "fp32"},
    "cluster": {"name": "cpu-4", "gpus_per_node": 2},
    "knobs": {"micro_batch_size": [1, 2], "tp": [1, 2]},
    "baseline": {"micro_batch_size": 1},
    "budget": {"trials": TRIALS, "min_gain": None, "finalists": 0},
    "measurement": {"min_steps": 5, "max_steps": 5},
    "program": {
        "command": [
            sys.executable,
            str(ROOT / "tests" / "integration" / "programs" / "trainer.py"),
            *("--train-iters", "{steps}", "--micro-batch-size", "{micro_batch_size}"),
            *("--tensor-model-parallel-size", "{tp}"),
        ],
        "log": "megatron-lm",
    },
}
"""A trainer that sleeps: a trial takes 2 s, most of it start-up."""


@dataclass(frozen=True, slots=True)
class Night:
    """A running sweep on which a fault falls."""

    results: Path
    """The folder of results folders, a disk of its own with 32 MiB."""
    sweep: SweepFolder
    tuner: subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class BadNight:
    """A fault of a sweep."""

    name: str
    exit_code: int
    """The exit code that the sweep must end with."""
    fault: Callable[[Night, ExitStack], None]
    """Makes the fault while the tuner takes in its first result; the stack ends it once the sweep has ended."""
    keeps: bool = True
    """Whether what was measured before the fault must still be there."""


@dataclass(frozen=True, slots=True)
class Morning:
    """What is left of a sweep after a bad night."""

    exit_code: int
    kept: int
    """How many trials were finished when the sweep ended."""
    orphans: int
    resumed_exit_code: int
    """The exit code of the same command, run again without the fault."""
    finished: int
    """How many trials were finished then."""
    changed: int
    """How many of the kept trials had another result then."""

    def wrong(self, night: BadNight) -> str:
        """Return what is not as it must be; empty if all is."""
        if self.exit_code != night.exit_code:
            return f"exit code {self.exit_code}, not {night.exit_code}"
        if self.orphans or self.changed or (night.keeps and not self.kept):
            return f"{self.orphans} orphans, {self.changed} results changed, {self.kept} kept"
        if (self.resumed_exit_code, self.finished) != (0, TRIALS):
            return f"resumed: exit code {self.resumed_exit_code}, {self.finished} of {TRIALS} trials"
        return ""


def _full_disk(night: Night, stack: ExitStack) -> None:
    fill(night.results)
    stack.callback((night.results / "filler").unlink)


def _no_inodes(night: Night, stack: ExitStack) -> None:
    fill_names(night.results)
    stack.callback(shutil.rmtree, night.results / "fillers")


def _read_only(night: Night, stack: ExitStack) -> None:
    stack.enter_context(read_only(night.sweep.path))


def _deleted(night: Night, stack: ExitStack) -> None:
    delete(night.sweep.path)


def _output_closed(night: Night, stack: ExitStack) -> None:
    for stream in (night.tuner.stdout, night.tuner.stderr):
        assert stream is not None
        stream.close()


def _follower_killed(night: Night, stack: ExitStack) -> None:
    for process in psutil.Process(night.tuner.pid).children():
        if "tuner.tracking.follow" in process.cmdline():
            process.kill()
            return
    raise AssertionError("no process follows the sweep for MLflow")


BAD_NIGHTS = (
    BadNight("full disk between trials", 4, _full_disk),
    BadNight("no inodes between trials", 4, _no_inodes),
    BadNight("results folder becomes read-only", 4, _read_only),
    BadNight("results folder deleted", 4, _deleted, keeps=False),
    BadNight("stdout and stderr closed", 0, _output_closed),
    BadNight("MLflow's follower killed", 0, _follower_killed),
)


def live_through(night: BadNight, folder: Path) -> Morning:
    """Start a sweep in an empty folder, let the fault fall on it, and run the same command again.

    Raises:
        pytest.skip.Exception: if no disk can be mounted here.
    """
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    results = folder / "results"
    results.mkdir()
    with small_disk(results, size="32m"):
        sweep = SweepFolder(results / "night")
        tuner = start(folder, "sweep", "sweep.yaml")
        with ExitStack() as stack:
            with held_after_trial_0(sweep, tuner):
                night.fault(Night(results, sweep, tuner), stack)
            exit_code = _wait(tuner)
            orphans = len(marked_processes(str(folder)))
        before = [trial.result for trial in read_trials(sweep.path)] if sweep.trials.exists() else []
        resumed_exit_code = _wait(start(folder, "sweep", "sweep.yaml"))
        after = [trial.result for trial in read_trials(sweep.path)]
    return Morning(
        exit_code=exit_code,
        kept=len(before),
        orphans=orphans,
        resumed_exit_code=resumed_exit_code,
        finished=len(after),
        changed=sum(a != b for a, b in zip(before, after, strict=False)),
    )


def start(folder: Path, *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a megatune command in a folder, without the user's MLflow; its output goes into pipes unless told."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **streams}
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        **streams,
    )


@contextmanager
def held_after_trial_0(sweep: SweepFolder, tuner: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hold the tuner up while it takes in the result of trial 0."""
    wait_for(sweep.trial(0).result, tuner)
    tuner.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        tuner.send_signal(signal.SIGCONT)


def wait_for(path: Path, tuner: subprocess.Popen[bytes]) -> None:
    """Wait until a file exists, while the tuner runs."""
    deadline_s = time.monotonic() + 120
    while not path.exists():
        assert tuner.poll() is None, "the sweep ended early"
        assert time.monotonic() < deadline_s, f"{path} never came"
        time.sleep(0.005)


def _wait(tuner: subprocess.Popen[bytes]) -> int:
    """Wait for a command's end, and read what it prints meanwhile; return its exit code."""
    streams: list[IO[bytes] | None] = [tuner.stdout, tuner.stderr]
    if any(stream is None or stream.closed for stream in streams):
        return tuner.wait(timeout=200)
    tuner.communicate(timeout=200)
    return tuner.returncode
