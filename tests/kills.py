"""Kills tuners at random instants and resumes them; `python -m tests.kills FOLDER TRIALS SLOTS` is such a tuner.

A tuner runs the sweep of the command line without MLflow. The results of its program are a formula of the layout, so
the finished trials must be the same however often the tuner is killed.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.machine.identity import measuring_machine
from launchers.processes import end_marked, marked_processes
from search_spaces.loader import load_cluster
from tests.integration.programs import formula
from tuner.files import parse, read_json_lines
from tuner.space.enumeration import enumerate_layouts
from tuner.space.heuristics import seeds
from tuner.sweep.configuration import SweepFile
from tuner.sweep.folder import SweepFolder
from tuner.sweep.resolution import resolve
from tuner.trial.contract import Metrics
from tuner.trial.finished import SEARCHED, read_trials

ORPHANS_S = 5.0
"""Seconds within which the processes of a killed tuner must end by themselves."""
SWEEP: Mapping[str, Any] = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 64, "global_batch_size": 8, "precision": "fp32"},
    "cluster": {"name": "cpu-4", "gpus_per_node": 2, "memory_gib": 0.12},
    "knobs": {
        "tp": [1, 2],
        "pp": [1, 2],
        "micro_batch_size": [1, 2, 4],
        "recompute_granularity": ["none", "full"],
        "recompute_method": ["none", "uniform"],
        "recompute_num_layers": [0, 1],
    },
}
TRIALS = 15
"""Trials of a sweep, canaries and finals included: enough for every outcome that the formula has."""


def tune(path: Path, trials: int, slots: int = 1) -> None:
    """Begin or resume the sweep and run it to its end, as `megatune sweep` does, with up to `slots` trials at once."""
    from tuner.sweep.controller import resumed
    from tuner.sweep.policy import queue_of
    from tuner.sweep.runner import ThreadRunner
    from tuner.sweep.study import StudyProjection
    from tuner.trial.launcher import Place

    budget = {"trials": trials, "min_gain": None, "finalists": 1, "final_runs": 2, "canary_every": 4}
    file = parse(SweepFile, {**SWEEP, "budget": budget}, "night")
    sweep = resolve(file, "night", Path(), lambda: load_cluster("cpu-4"))
    table = enumerate_layouts(sweep.workload, sweep.cluster, sweep.domain, lifted=sweep.lifted).table
    queue = queue_of(sweep.baseline, seeds(sweep.workload, sweep.cluster, table))
    folder = SweepFolder(path)
    with (
        folder.claimed(sweep, measuring_machine(sweep.cluster)),
        Preload(folder.path) as preload,
    ):
        # So many cores that no load of other jobs counts as a disturbance: a disturbed trial would be repeated.
        launcher = TorchrunLauncher(
            programs={str(sweep.program): formula.__name__}, start=preload.start, cores=4096
        )
        end_marked(str(path.absolute()), grace_s=10.0)
        stop = threading.Event()
        places = tuple(Place() for _ in range(slots))
        with ThreadRunner(launcher, stop, places) as runner:
            resumed(
                sweep,
                table=table,
                queue=queue,
                folder=folder,
                runner=runner,
                stop=stop,
                sinks=[StudyProjection(folder.study, sweep.name)],
            ).run()


def start(path: Path, trials: int, slots: int) -> subprocess.Popen[bytes]:
    """Start a tuner as a process."""
    command = [sys.executable, "-m", __spec__.name, str(path), str(trials), str(slots)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def to_end(path: Path, trials: int, slots: int) -> float:
    """Run a tuner to its end; return how long it lived, in seconds."""
    began_s, tuner = time.monotonic(), start(path, trials, slots)
    try:
        assert tuner.wait(timeout=600) == 0, f"the tuner of {path} failed"
    finally:
        tuner.kill()
        tuner.wait()
    return time.monotonic() - began_s


@dataclass(kw_only=True)
class Tally:
    """The effects of the kills."""

    kills: int = 0
    """Number of tuners that were killed."""
    sweeps: int = 0
    """Number of sweeps that were killed at least once and came to their end."""
    trials: int = 0
    """Number of finished trials of these sweeps."""
    lost: int = 0
    """Number of trials that these sweeps have fewer than a sweep that nobody killed."""
    twice: int = 0
    """Number of results that were written twice, and of layouts that were searched twice."""
    differing: list[str] = field(default_factory=list)
    """The first difference of each sweep from the sweep that nobody killed."""
    orphans: int = 0
    """Number of processes that lived longer than ORPHANS_S after their tuner was killed."""
    slowest_s: float = 0.0
    """The longest time that a process outlived its tuner, in seconds."""


@dataclass(frozen=True, slots=True)
class Repeatable:
    """The part of a finished trial that must not depend on the kills."""

    number: int
    source: str
    note: str
    layout: str
    outcome: str
    metrics: Metrics | None


def repeatable_trials(path: Path) -> list[Repeatable]:
    """Return the part of each finished trial of a results folder that must not depend on the kills."""
    return [
        Repeatable(
            trial.number,
            trial.source,
            trial.note,
            trial.layout.label(),
            str(trial.result.outcome),
            trial.result.metrics,
        )
        for trial in read_trials(path)
    ]


def kill_and_resume(root: Path, kills: int, seed: int, trials: int = TRIALS, slots: int = 1) -> Tally:
    """Kill tuners at random instants and resume each, until the last sweep that was killed has ended.

    An instant lies between the start of a tuner and a quarter of the way from the end of its first trial to the end of
    its sweep, as measured on this machine. So the start is hit as often as the trials, and a sweep dies several times.

    Args:
        root: the folder that gets one results folder per sweep.
        kills: how many tuners to kill.
        seed: seed of the random instants.
        trials: the budget of trials of each sweep.
        slots: how many trials run at once.
    """
    draw, tally, whole = random.Random(seed), Tally(), root / "whole"
    began_s = time.time()
    life_s = to_end(whole, trials, slots)
    first_s = SweepFolder(whole).trial(0).result.stat().st_mtime - began_s
    longest_s = first_s + (life_s - first_s) / 4
    expected = repeatable_trials(whole)
    while tally.kills < kills:
        path = root / f"killed-{tally.sweeps}"
        while tally.kills < kills and _killed(
            start(path, trials, slots), path, draw.uniform(0, longest_s), tally
        ):
            pass
        to_end(path, trials, slots)
        _compare(path, expected, tally, slots)
    return tally


def _killed(tuner: subprocess.Popen[bytes], path: Path, after_s: float, tally: Tally) -> bool:
    """Kill a tuner `after_s` seconds from now and count its orphans; return False if it had ended before."""
    try:
        assert tuner.wait(timeout=after_s) == 0, f"the tuner of {path} failed"
        return False
    except subprocess.TimeoutExpired:
        tuner.kill()
    finally:
        tuner.wait()
    tally.kills += 1
    began_s = time.monotonic()
    while left := marked_processes(str(path.absolute())):
        tally.slowest_s = time.monotonic() - began_s
        if tally.slowest_s > ORPHANS_S:
            tally.orphans += len(left)
            break
        time.sleep(0.05)
    return True


def _compare(path: Path, expected: list[Repeatable], tally: Tally, slots: int) -> None:
    """Add a sweep that was killed to the tally.

    With several trials in flight the trials depend on which of them ends first. Only what must hold for every sweep is
    then compared: it has as many trials as without kills, and no layout is searched twice.
    """
    finished = repeatable_trials(path)
    tally.sweeps += 1
    tally.trials += len(finished)
    tally.lost += max(0, len(expected) - len(finished))
    if slots == 1:
        tally.differing += [
            f"{path.name}: {a} and not {b}" for a, b in zip(finished, expected, strict=False) if a != b
        ][:1]
    searched = [trial.layout for trial in read_trials(path) if trial.source in SEARCHED]
    tally.twice += len(searched) - len(set(searched))
    written = [line["number"] for line in read_json_lines(path / "written.jsonl")]
    tally.twice += len(written) - len(set(written))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    tune(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
