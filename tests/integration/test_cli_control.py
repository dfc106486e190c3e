"""`megatune show`, `pause`, `resume` and `stop` on a sweep that another process runs."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launchers.processes import marked_processes
from tuner.files import read_json
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialResult
from tuner.trial.finished import read_trials

SWEEP = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 64, "global_batch_size": 4, "precision": "fp32"},
    "cluster": {"name": "cpu-4", "gpus_per_node": 2},
    "knobs": {"micro_batch_size": [1, 2]},
    "baseline": {"micro_batch_size": 1},
    "budget": {"trials": 8, "min_gain": None},
    "measurement": {"min_steps": 600, "max_steps": 600},
    "program": {
        "command": [
            *(
                sys.executable,
                str(Path(__file__).parent / "programs" / "trainer.py"),
                "--train-iters",
                "{steps}",
            ),
            *("--micro-batch-size", "{micro_batch_size}", "--tensor-model-parallel-size", "{tp}"),
        ],
        "log": "megatron-lm",
    },
}
"""A trainer that sleeps: the baseline takes 24 s and the next trial 12 s, however busy the machine is."""


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _said(folder: Path, *arguments: str, code: int = 0) -> str:
    process = _start(folder, *arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return out + err


def _shown(folder: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(_said(folder, "show", "night", "--json"))
    return shown


def _wait_until(condition: Callable[[], bool], tuner: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert tuner.poll() is None, "the sweep ended early"
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.1)


def test_a_running_sweep_is_watched_paused_resumed_and_stopped_from_outside(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    folder = SweepFolder(tmp_path / "results" / "night")
    tuner = _start(tmp_path, "sweep", "sweep.yaml")
    _wait_until(folder.trial(0).heartbeat.exists, tuner)

    shown = _shown(tmp_path)
    assert shown["is_running"]
    assert [trial["number"] for trial in shown["status"]["running"]] == [0]
    assert "This sweep runs now" in _said(tmp_path, "show", "night")

    assert "paused" in _said(tmp_path, "pause", "night")
    _wait_until(lambda: len(read_trials(folder.path)) == 1, tuner)
    time.sleep(2.0)
    assert not folder.trial(1).spec.exists(), "a paused sweep starts nothing"
    assert _shown(tmp_path)["status"]["halt"].startswith("paused")

    assert "going on" in _said(tmp_path, "resume", "night")
    _wait_until(folder.trial(1).heartbeat.exists, tuner)
    stopped = re.search(
        r"stopped after (\d+) finished trials", _said(tmp_path, "stop", "night", "--after-this-trial")
    )
    assert stopped is not None
    out, err = tuner.communicate(timeout=60)
    assert tuner.returncode == 130, err
    assert "go on with:\n    megatune sweep sweep.yaml\n" in out
    assert len(read_trials(folder.path)) == int(stopped[1]) >= 2
    assert not folder.trial(int(stopped[1])).spec.exists(), (
        "the trial that ran came to its end, and no other began"
    )
    assert not _shown(tmp_path)["is_running"]
    assert "no megatune runs this sweep" in _said(tmp_path, "stop", "night", code=2)


def test_a_sweep_that_is_stopped_at_once_interrupts_its_trial(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    folder = SweepFolder(tmp_path / "results" / "night")
    tuner = _start(tmp_path, "sweep", "sweep.yaml")
    _wait_until(folder.trial(0).heartbeat.exists, tuner)
    assert "ending trial 0" in _said(tmp_path, "stop", "night")
    assert tuner.wait(timeout=60) == 130
    assert read_json(TrialResult, folder.trial(0).result).outcome is Outcome.INTERRUPTED
    assert marked_processes(str(tmp_path)) == []
