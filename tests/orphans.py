"""Tuners that die while a trial runs, for each way of starting a program: what is left of the trial, and how long."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from launchers.processes import marked_processes
from tuner.sweep.folder import SweepFolder

ROOT = Path(__file__).parents[1]
ORPHANS_S = 5.0
"""Seconds within which the processes of a dead tuner must end by themselves."""
DEATHS = (signal.SIGKILL, signal.SIGHUP, signal.SIGTERM)
PROGRAMS = ("forked", "cold", "command", "megatron_lm")
"""The ways in which the program of a trial is started."""

_DESERTER = ROOT / "tests" / "integration" / "programs" / "deserter.py"
_SWEEP: Mapping[str, Any] = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 64, "global_batch_size": 4, "precision": "fp32"},
    "cluster": {"name": "cpu-4", "gpus_per_node": 2},
    "knobs": {"micro_batch_size": [1, 2]},
    "measurement": {"min_steps": 5000, "max_steps": 5000},
}
_MEGATRON_LM = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --vocab-size 511 --tokenizer-type NullTokenizer --mock-data --lr 1e-3 "
    "--train-iters 1000 --global-batch-size 4 --micro-batch-size 1"
)


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What was left of a trial after its tuner had died."""

    began: int
    """How many processes the trial had before."""
    outlived_s: float
    """For how long the last of them outlived the tuner, up to twice ORPHANS_S."""
    orphans: int
    """How many of them outlived it by more than ORPHANS_S."""


def kill_tuner(program: str, number: signal.Signals, folder: Path) -> Aftermath:
    """Start a sweep in `folder`, send its tuner a signal while the first trial runs, and see what outlives it.

    Args:
        program: One of PROGRAMS.
        number: The signal. The time counts from the tuner's death, which ends a trial first if it can.
        folder: An empty folder.
    """
    pids = folder / "pids"
    cold = ["--cold"] if program == "cold" else []
    (folder / "sweep.yaml").write_text(yaml.safe_dump(_sweep(program, folder, pids)))
    tuner = subprocess.Popen(
        [sys.executable, "-m", "tuner", "sweep", "sweep.yaml", *cold],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup, this process and its children would ignore SIGHUP.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    results = SweepFolder(folder / "results" / "night")
    started = results.trial(0).heartbeat if program in {"forked", "cold"} else pids
    deadline_s = time.monotonic() + 120
    try:
        while not started.exists():
            if tuner.poll() is not None or time.monotonic() > deadline_s:
                tuner.kill()
                raise AssertionError(f"the first trial never began: {tuner.communicate()[1]}")
            time.sleep(0.1)
        time.sleep(0.5)  # all ranks are up
        processes = _processes(results.path, pids)
        tuner.send_signal(number)
        tuner.wait(timeout=60)
    finally:
        tuner.kill()
        tuner.communicate()
    return _watch(processes)


def _sweep(program: str, folder: Path, pids: Path) -> Mapping[str, Any]:
    if program == "command":
        command = [sys.executable, str(_DESERTER), str(pids), "{micro_batch_size}"]
        return {**_SWEEP, "program": {"command": command, "log": "megatron-lm"}}
    if program == "megatron_lm":
        (folder / "pretrain_gpt.py").write_text(
            f"import runpy, sys\nsys.argv = ['deserter', {str(pids)!r}]\n"
            f"runpy.run_path({str(_DESERTER)!r}, run_name='__main__')\n"
        )
        script = f"torchrun --nproc-per-node 2 pretrain_gpt.py {_MEGATRON_LM}\n"
        (folder / "train.sh").write_text(script)
        sweep = {key: value for key, value in _SWEEP.items() if key != "workload"}
        return {**sweep, "program": {"megatron_lm": ["train.sh"]}}
    return _SWEEP


def _processes(results: Path, pids: Path) -> list[psutil.Process]:
    """Return the processes of the running trial: those with its marker, and those that the program names."""
    named = [int(line) for line in pids.read_text().split()] if pids.exists() else []
    processes = set(marked_processes(str(results)))
    for pid in named:
        with suppress(psutil.NoSuchProcess):
            processes.add(psutil.Process(pid))
    return list(processes)


def _watch(processes: list[psutil.Process]) -> Aftermath:
    died_s = time.monotonic()
    left, outlived_s, orphans = _running(processes), 0.0, 0
    while left and outlived_s < 2 * ORPHANS_S:
        time.sleep(0.05)
        outlived_s, left = time.monotonic() - died_s, _running(left)
        if outlived_s <= ORPHANS_S:
            orphans = len(left)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    return Aftermath(began=len(processes), outlived_s=outlived_s, orphans=orphans)


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    running = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running
