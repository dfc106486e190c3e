"""A tuner that is killed at any instant, and resumed: `python -m tests.kills FOLDER` is that tuner.

It is the sweep of the command line without MLflow, over a program whose results are a formula, so that its table must
come out the same however often it dies.
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
from tuner.trial.finished import SEARCHED, read_trials

ORPHANS_S = 5.0
"""What a killed tuner started must have ended by itself within."""
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
"""With canaries and finals, as many as end in each of the formula's ways."""


def tune(path: Path, trials: int, slots: int = 1) -> None:
    """Run the sweep, or go on with it, to its end, as `megatune sweep` does; `slots` trials at once, without MLflow."""
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
        # So many cores that no load of other jobs counts: what is disturbed is measured again, and changes the table.
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
    """The tuner as a process."""
    command = [sys.executable, "-m", __spec__.name, str(path), str(trials), str(slots)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def to_end(path: Path, trials: int, slots: int) -> float:
    """Run the tuner to its end; returns how long it lived, in seconds."""
    began_s, tuner = time.monotonic(), start(path, trials, slots)
    try:
        assert tuner.wait(timeout=600) == 0, f"the tuner of {path} failed"
    finally:
        tuner.kill()
        tuner.wait()
    return time.monotonic() - began_s


@dataclass(kw_only=True)
class Tally:
    """What became of the kills."""

    kills: int = 0
    sweeps: int = 0
    """That were killed at least once, and came to their end."""
    trials: int = 0
    """In their tables."""
    lost: int = 0
    """Trials that an equal table lacks."""
    twice: int = 0
    """Trials whose result was written twice, and layouts that were searched twice."""
    differing: list[str] = field(default_factory=list)
    """The first difference of each table from that of the sweep that nobody killed."""
    orphans: int = 0
    """Processes alive longer than ORPHANS_S after their tuner was killed."""
    slowest_s: float = 0.0
    """The longest that a process outlived its tuner."""


Row = tuple[object, ...]


def table_of(path: Path) -> list[Row]:
    """What must not depend on the kills."""
    return [
        (row.number, row.source, row.note, row.layout.label(), str(row.result.outcome), row.result.metrics)
        for row in read_trials(path)
    ]


def kill_and_resume(root: Path, kills: int, seed: int, trials: int = TRIALS, slots: int = 1) -> Tally:
    """Kill tuners at random moments, and resume each, until a sweep has ended after the last kill.

    However fast the machine, the moments lie between a tuner's start and a quarter of the way from the end of its first
    trial to that of its sweep: so the start is hit as often as the trials, and a sweep dies several times.
    """
    draw, tally, whole = random.Random(seed), Tally(), root / "whole"
    began_s = time.time()
    life_s = to_end(whole, trials, slots)
    first_s = SweepFolder(whole).trial(0).result.stat().st_mtime - began_s
    longest_s = first_s + (life_s - first_s) / 4
    expected = table_of(whole)
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
    """Whether the tuner was still alive when it was killed."""
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


def _compare(path: Path, expected: list[Row], tally: Tally, slots: int) -> None:
    """Add a sweep's table to the tally.

    With several trials in flight the table depends on which ended first, so only what must hold of every table is
    compared: as many trials as without kills, and no layout searched twice.
    """
    found = table_of(path)
    tally.sweeps += 1
    tally.trials += len(found)
    tally.lost += max(0, len(expected) - len(found))
    if slots == 1:
        tally.differing += [
            f"{path.name}: {a} and not {b}" for a, b in zip(found, expected, strict=False) if a != b
        ][:1]
    searched = [trial.layout for trial in read_trials(path) if trial.source in SEARCHED]
    tally.twice += len(searched) - len(set(searched))
    written = [line["number"] for line in read_json_lines(path / "written.jsonl")]
    tally.twice += len(written) - len(set(written))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    tune(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
