"""Measure every valid layout of a sweep file, three times: `python -m tests.bench.landscape FOLDER [seconds]`.

FOLDER holds `sweep.yaml`; `trials.csv` grows beside it, one line a trial, and the same command goes on where it
stopped, if told to after so many seconds. Layouts that are predicted to run out of memory are measured like all others.

Protocol: each repeat takes all layouts in an order of its own, so that a slow hour of the machine touches every
layout alike; each trial is a job of its own processes, forked from a parent that has imported Megatron.
"""

import csv
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.machine.detect import detect_cluster
from tuner.core.layout import KNOBS
from tuner.files import write_text
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import layout_at
from tuner.sweep.configuration import Sweep, load_sweep
from tuner.sweep.loop import trial_spec
from tuner.trial.contract import Outcome, TrialFolder, TrialResult

LANDSCAPES: Final = Path(__file__).parents[2] / "results" / "published" / "landscapes"
REPEATS: Final = 3
MEASURED: Final = frozenset({Outcome.COMPLETED, Outcome.OOM})


@dataclass(frozen=True, slots=True)
class Landscape:
    """A sweep of which every valid layout was measured."""

    sweep: Sweep
    table: pd.DataFrame
    """One row a layout, one column a knob."""
    step_time_ms: NDArray[np.float64]
    """Shape [layouts, repeats]; NaN where the layout ran out of memory."""
    peak_gib: NDArray[np.float64]
    """The worst rank's; NaN where the layout ran out of memory."""
    durations_s: NDArray[np.float64]
    """Of a trial, from launch to end; the median of the repeats."""

    @property
    def median_ms(self) -> NDArray[np.float64]:
        """Each layout's step time: the median of its repeats."""
        middle: NDArray[np.float64] = np.median(self.step_time_ms, axis=1)
        return middle


def landscapes(root: Path = LANDSCAPES) -> Iterator[Landscape]:
    """Every landscape below `root`."""
    for path in sorted(root.glob("*/trials.csv")):
        yield read(path.parent)


def read(folder: Path) -> Landscape:
    """The landscape in a folder; every layout must have been measured as often."""
    sweep, table = _problem(folder)
    trials = pd.read_csv(
        folder / "trials.csv", keep_default_na=False, na_values={"step_time_ms": [""], "peak_gib": [""]}
    )
    trials = trials.sort_values(["row", "repeat"])
    shape = (len(table), trials["repeat"].nunique())
    knobs = [knob for knob in KNOBS if knob in trials]
    first = trials.drop_duplicates("row")
    if len(trials) != shape[0] * shape[1] or not (first[knobs].to_numpy() == table[knobs].to_numpy()).all():
        raise ValueError(f"{folder}: trials.csv does not hold every layout of sweep.yaml equally often")
    of_layout = {
        name: trials[name].to_numpy().reshape(shape) for name in ("step_time_ms", "peak_gib", "total_s")
    }
    return Landscape(
        sweep,
        table,
        of_layout["step_time_ms"],
        of_layout["peak_gib"].max(axis=1),
        np.median(of_layout["total_s"], axis=1),
    )


def _problem(folder: Path) -> tuple[Sweep, pd.DataFrame]:
    sweep = load_sweep(folder / "sweep.yaml", detect_cluster)
    return sweep, enumerate_layouts(sweep.workload, sweep.cluster, sweep.domain, lifted=sweep.lifted).table


def measure(folder: Path, seconds: float) -> None:
    """Measure what is missing in a folder's `trials.csv`, for so many seconds at most."""
    sweep, table = _problem(folder)
    path, deadline_s = folder / "trials.csv", time.monotonic() + seconds
    done = _done(path)
    varied = [knob for knob in KNOBS if table[knob].nunique() > 1]
    work = Path(tempfile.mkdtemp(prefix="landscape-"))
    with Preload(work) as preload:
        launcher = TorchrunLauncher(start=preload.start)
        for repeat in range(REPEATS):
            order = np.random.default_rng((sweep.seed, repeat)).permutation(len(table))
            for row in (int(row) for row in order if (repeat, int(row)) not in done):
                if time.monotonic() > deadline_s:
                    return
                layout = layout_at(table, row)
                trial = TrialFolder(work / f"{repeat}-{row}")
                trial.path.mkdir()
                spec = replace(trial_spec(sweep, row, 1, layout), attempt=repeat + 1)
                result = launcher.run(launcher.plan(spec, trial), threading.Event())
                print(
                    f"{repeat} {row:>3}  {layout.label():<40} {result.outcome}  {result.reason}", flush=True
                )
                if result.outcome not in MEASURED:
                    sys.exit(
                        f"{trial.path}: {result.outcome}: neither measured nor out of memory; not recorded"
                    )
                _append(
                    path,
                    {"repeat": repeat, "row": row} | {k: getattr(layout, k) for k in varied} | _facts(result),
                )
                shutil.rmtree(trial.path)
                if result.versions:
                    _describe(folder, result)
    shutil.rmtree(work)


def _done(path: Path) -> set[tuple[int, int]]:
    if not path.exists():
        return set()
    trials = pd.read_csv(path, usecols=["repeat", "row"])
    return {(int(repeat), int(row)) for repeat, row in trials.itertuples(index=False)}


def _facts(result: TrialResult) -> dict[str, Any]:
    metrics, durations = result.metrics, result.durations
    facts: dict[str, Any] = {"outcome": str(result.outcome), "phase": result.phase or ""}
    facts |= dict.fromkeys(
        ("step_time_ms", "step_time_low_ms", "step_time_high_ms", "peak_gib", "step_times_ms"), ""
    )
    if metrics is not None:
        facts |= {
            "step_time_ms": round(metrics.step_time_ms, 3),
            "step_time_low_ms": round(metrics.step_time_low_ms, 3),
            "step_time_high_ms": round(metrics.step_time_high_ms, 3),
            "peak_gib": round(metrics.peak_allocated_gib, 6),
            "step_times_ms": " ".join(f"{value:.2f}" for value in metrics.step_times_ms),
        }
    spent = {
        name: round(getattr(durations, name), 2) for name in ("startup_s", "build_s", "warmup_s", "measure_s")
    }
    return facts | spent | {"total_s": round(durations.total_s, 2), "finished_at": result.finished_at}


def _append(path: Path, row: Mapping[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def _describe(folder: Path, result: TrialResult) -> None:
    """Where the trials ran."""
    machine = {
        "device": result.device_name,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "versions": dict(result.versions),
    }
    write_text(folder / "machine.json", json.dumps(machine, indent=2) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


if __name__ == "__main__":
    measure(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else float("inf"))
