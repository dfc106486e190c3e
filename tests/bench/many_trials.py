"""How megatune scales with the number of trials: `python -m tests.bench.many_trials [TRIALS ...]`.

The results folders are synthetic, but as valid as those of a real sweep: each trial has its spec, source, result and
plan, and took a layout that the sweep may launch. For each number of trials the command prints

- the wall and CPU time of `show`, `export` and `explain`, each as a process from its start to its end: without an index
  of the trials, with it, and (`status`) for `show` after the last trial has changed;
- the time that a resumed sweep takes until its first trial starts, with its study and its status file;
- the times from the end of a trial to the start of the next one. The study is built by a thread meanwhile.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from search_spaces.loader import load_cluster
from tests.replay import claim, sweep_of
from tuner.core.columns import Floats
from tuner.core.layout import Layout, layout_from
from tuner.files import to_data
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.predict.time.step import step_time_ms
from tuner.search.grid import grid_space
from tuner.space.heuristics import seeds
from tuner.space.table import layout_at
from tuner.sweep.configuration import Sweep
from tuner.sweep.controller import resumed
from tuner.sweep.folder import SweepFolder
from tuner.sweep.policy import queue_of
from tuner.sweep.runner import AttemptEnded, Beat
from tuner.sweep.specs import trial_spec
from tuner.sweep.status import StatusFile
from tuner.sweep.study import StudyProjection
from tuner.trial.contract import Durations, Metrics, Outcome, RankRecord, Telemetry, TrialResult, TrialSpec
from tuner.trial.contract import TrialFolder as Folder
from tuner.trial.finished import TrialSource

COUNTS: Final = (1_000, 5_000, 10_000)
"""Numbers of trials to measure at."""
STEPS: Final = 20
"""Timed steps of a completed trial."""
WARMUP: Final = 3
"""Warm-up steps of a completed trial."""
RECORDS: Final = 8
"""Ranks that left a record in each result."""
CANARY_EVERY: Final = 50
"""Trials between two runs of the baseline."""
ASKS: Final = 5
"""Further trials that a resumed sweep runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine that ends every trial as a formula says: the predicted step time and peak, each with an error."""

    sweep: Sweep
    table: pd.DataFrame
    """The layouts that the sweep may launch."""
    step_ms: Floats
    """The step time of each layout, of shape [rows]."""
    peak_gib: Floats
    """The peak of memory of each layout, of shape [rows]."""

    def result(self, number: int, row: int, limit_ms: float) -> TrialResult:
        """The result of a trial; it is stopped as too slow if a step takes longer than `limit_ms`."""
        step_ms, gib = float(self.step_ms[row]), float(self.peak_gib[row])
        ranks = tuple(
            RankRecord(
                rank=rank, host="node-0", phase="teardown", step=STEPS + WARMUP, peak_allocated_gib=gib
            )
            for rank in range(RECORDS)
        )
        ending: dict[str, Any] = {
            "ranks": ranks,
            "telemetry": Telemetry(samples=30, power_w=21_000.0, clock_mhz=1_755.0, temperature_c=64.0),
            "durations": Durations(startup_s=9.0, build_s=2.0, warmup_s=4.0, measure_s=20.0, total_s=36.0),
            "versions": {
                "torch": "2.9.0",
                "megatron-core": "0.16.1",
                "python": "3.11",
                "CUDA": "13.0",
                "NCCL": "2.28",
            },
            "device_name": "NVIDIA H100 80GB HBM3",
            "finished_at": (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat(),
        }
        if gib > self.sweep.cluster.gpu.memory_gib:
            reason = "rank 3 ran out of memory"
            return TrialResult(outcome=Outcome.OOM, reason=reason, phase="warmup", rank=3, **ending)
        if step_ms > limit_ms:
            reason = "cannot beat the best layout"
            return TrialResult(outcome=Outcome.TOO_SLOW, reason=reason, slower_than_ms=limit_ms, **ending)
        tokens_per_s = self.sweep.workload.tokens_per_step / (step_ms / 1e3) / self.sweep.cluster.world_size
        noise = 1 + 0.002 * np.sin(np.arange(STEPS) + number)
        metrics = Metrics(
            step_times_ms=tuple((step_ms * noise).tolist()),
            step_time_ms=step_ms,
            step_time_low_ms=step_ms * 0.999,
            step_time_high_ms=step_ms * 1.001,
            warmup_times_ms=(step_ms * 2, step_ms, step_ms),
            losses=tuple((11.0 - 0.01 * np.arange(STEPS + WARMUP)).tolist()),
            grad_norms=tuple((1.5 + 0.01 * np.arange(STEPS + WARMUP)).tolist()),
            tokens_per_s_per_gpu=tokens_per_s,
            model_tflops_per_s_per_gpu=tokens_per_s / 50,
            mfu=tokens_per_s / 50 / 989,
            peak_allocated_gib=gib,
            peak_reserved_gib=gib * 1.05,
        )
        reason = f"{STEPS} steps measured"
        return TrialResult(outcome=Outcome.COMPLETED, reason=reason, metrics=metrics, **ending)


def machine_of(trials: int) -> Machine:
    """A default sweep of 32 GPUs, with 14,854 layouts in its grid, and the machine that it runs on."""
    cluster = replace(load_cluster("dgx-h100"), nodes=4)
    model = {"model": "qwen3-30b-a3b", "seq_length": 4096, "global_batch_size": 512, "precision": "bf16"}
    budget = {"trials": 3 * trials, "canary_every": CANARY_EVERY, "finalists": 3}
    sweep = sweep_of(cluster, knobs=None, workload=model, budget=budget)
    table = grid_space(sweep.problem).table
    table = table[fit_probabilities(table, sweep.workload, cluster) >= MIN_FIT].reset_index(drop=True)
    implementation, random = implementation_of(cluster), np.random.default_rng(0)
    predicted_ms = step_time_ms(table, sweep.workload, cluster, implementation)
    return Machine(
        sweep=sweep,
        table=table,
        step_ms=predicted_ms * 1.2 * np.exp(0.1 * random.standard_normal(len(table))),
        peak_gib=peak_gib(table, sweep.workload, cluster, implementation)
        * (1 + 0.05 * random.standard_normal(len(table))),
    )


def write_folder(machine: Machine, path: Path, trials: int) -> SweepFolder:
    """Write the results of a sweep that has run this many trials."""
    sweep, folder, random = machine.sweep, SweepFolder(path), np.random.default_rng(1)
    claim(folder, sweep)
    rows = np.argsort(machine.step_ms * np.exp(0.2 * random.standard_normal(len(machine.table))))
    runs = np.flatnonzero(machine.peak_gib[rows] < 0.9 * sweep.cluster.gpu.memory_gib)
    baseline, best_ms, others = int(rows[runs[0]]), np.inf, iter(rows.tolist())
    spec = to_data(trial_spec(sweep, 0, 1, layout_at(machine.table, baseline)))
    layouts = [{str(k): v for k, v in row.items()} for row in machine.table.to_dict("records")]
    for number in range(trials):
        source = "canary" if number % CANARY_EVERY == 0 else "sampler"
        row = baseline
        if number == 0:
            source = "baseline"
        elif source == "sampler":
            row = next(other for other in others if other != baseline)
        # Half of the trials measure to their end, which gives the surrogate most to do.
        limit_ms = best_ms * 1.5 if source == "sampler" and number % 2 else np.inf
        result = machine.result(number, row, limit_ms)
        if result.metrics is not None:
            best_ms = min(best_ms, result.metrics.step_time_ms)
        trial = folder.trial(number)
        trial.log.mkdir(parents=True)
        for file, data in (
            (trial.spec, {**spec, "number": number, "layout": layouts[row]}),
            (trial.source, to_data(TrialSource(source=source))),
            (trial.result, to_data(result)),
            (trial.plan, {"command": f"torchrun --nproc-per-node=8 trial {number}"}),
        ):
            file.write_text(json.dumps(data, indent=2))
    return folder


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment on two clocks, or the time between two moments."""

    wall_s: float
    cpu_s: float
    """CPU time of the tuner's main thread."""

    @classmethod
    def now(cls) -> "Moment":
        """The present moment."""
        return cls(time.perf_counter(), time.thread_time())

    def since(self, earlier: "Moment") -> "Moment":
        """The time that passed since an earlier moment."""
        return Moment(self.wall_s - earlier.wall_s, self.cpu_s - earlier.cpu_s)


@dataclass(kw_only=True, slots=True)
class FormulaRunner:
    """Ends every trial at once, as the machine says."""

    machine: Machine
    rows: dict[Layout, int]
    left: int
    """How many trials may still run."""
    stop: threading.Event
    submitted: list[TrialSpec] = field(default_factory=list)
    ended: Moment
    """When the last trial ended; before the first one, when the sweep began to resume."""
    asked: list[Moment] = field(default_factory=list)
    """What passed from the end of each trial to the start of the next."""

    @property
    def free_slots(self) -> int:
        """See Runner."""
        return 1 - len(self.submitted)

    def submit(self, spec: TrialSpec, folder: Folder) -> None:
        """See Runner."""
        self.asked.append(Moment.now().since(self.ended))
        self.submitted.append(spec)

    def next_event(self, patience_s: float) -> Beat | AttemptEnded | None:
        """See Runner."""
        spec = self.submitted.pop()
        self.left -= 1
        if not self.left:
            self.stop.set()
        limit_ms = np.inf if spec.give_up_above_ms is None else spec.give_up_above_ms
        result = self.machine.result(spec.number, self.rows[spec.layout], limit_ms)
        self.ended = Moment.now()
        return AttemptEnded(number=spec.number, result=result)

    def stop_all(self) -> None:
        """See Runner."""
        self.stop.set()


def print_resume(machine: Machine, folder: SweepFolder) -> None:
    """Print how long a sweep takes to resume, and to go from the end of a trial to the start of the next one."""
    sweep, table, stop = machine.sweep, machine.table, threading.Event()
    rows = {layout: row for row, layout in enumerate(layouts_of(table))}
    queue = queue_of(sweep.baseline, seeds(sweep.workload, sweep.cluster, table))
    study = StudyProjection(folder.study, sweep.name)
    runner = FormulaRunner(machine=machine, rows=rows, left=ASKS + 1, stop=stop, ended=Moment.now())
    with folder.claimed(sweep):
        controller = resumed(
            sweep,
            table=table,
            queue=queue,
            folder=folder,
            runner=runner,
            stop=stop,
            sinks=[study, StatusFile(folder, world_size=sweep.cluster.world_size, near=0.05)],
        )
        controller.run()
    first, *others = runner.asked
    print(f"  resume, until the first trial starts: {first.wall_s:.2f} s, {first.cpu_s:.2f} s of CPU")
    asked_ms = ", ".join(f"{1e3 * asked.wall_s:.0f} ({1e3 * asked.cpu_s:.0f})" for asked in others)
    print(f"  from the end of a trial to the start of the next, in ms (of CPU): {asked_ms}", flush=True)


def layouts_of(table: pd.DataFrame) -> list[Layout]:
    """The layouts of a table, in the order of its rows."""
    return [
        layout_from({str(knob): value for knob, value in row.items()}) for row in table.to_dict("records")
    ]


def print_command(name: str, folder: SweepFolder, what: str) -> None:
    """Print the wall and CPU time of a command that reads a results folder."""
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "tuner", name, str(folder.path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"  {name}, {what}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU", flush=True)


def main() -> None:
    """Print the times at each number of trials."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="*", type=int, default=list(COUNTS))
    for trials in parser.parse_args().trials:
        machine = machine_of(trials)
        with tempfile.TemporaryDirectory() as root:
            folder = write_folder(machine, Path(root) / "night", trials)
            print(f"{trials:,} trials", flush=True)
            print_command("show", folder, "without an index")
            for name in ("show", "export", "explain"):
                print_command(name, folder, "with it")
            folder.trial(trials - 1).result.touch()
            print_command("show", folder, "status: one trial has changed")
            print_resume(machine, folder)


if __name__ == "__main__":
    main()
