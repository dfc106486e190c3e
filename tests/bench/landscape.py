"""Measure every valid layout of a sweep file three times: `python -m tests.bench.landscape FOLDER [SECONDS]`.

FOLDER holds `sweep.yaml`. The command appends one line per trial to `trials.csv` in FOLDER and stops after SECONDS, if
they are given; the same command continues where it stopped. It also measures layouts that are predicted to run out of
memory.

Each repeat measures all layouts in another random order, so that a slow hour of the machine affects every layout with
the same probability. Each trial is a job with processes of its own, forked from a parent that has imported Megatron.
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

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.machine.detect import detect_cluster
from tuner.core.columns import Floats
from tuner.core.layout import KNOBS
from tuner.files import write_text
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import layout_at
from tuner.sweep.configuration import Sweep
from tuner.sweep.resolution import load_sweep
from tuner.sweep.specs import trial_spec
from tuner.trial.contract import Outcome, TrialFolder, TrialResult

LANDSCAPES: Final = Path(__file__).parents[2] / "results" / "published" / "landscapes"
REPEATS: Final = 3
MEASURED: Final = frozenset({Outcome.COMPLETED, Outcome.OOM})
"""The outcomes that are recorded; any other one stops the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Landscape:
    """A sweep of which every valid layout was measured."""

    sweep: Sweep
    table: pd.DataFrame
    """One row per layout, columns as KNOBS."""
    step_time_ms: Floats
    """The measured step times, of shape [layouts, repeats]; NaN for a layout that ran out of memory."""
    peak_gib: Floats
    """The largest peak of any rank and repeat, of shape [layouts]; NaN for a layout that ran out of memory."""
    durations_s: Floats
    """The median duration of each layout's trials from launch to end, of shape [layouts]."""

    @property
    def median_ms(self) -> Floats:
        """The median step time of each layout's repeats, of shape [layouts]."""
        medians: Floats = np.median(self.step_time_ms, axis=1)
        return medians


def landscapes(root: Path = LANDSCAPES) -> Iterator[Landscape]:
    """Yield every landscape in the folders of `root`."""
    for path in sorted(root.glob("*/trials.csv")):
        yield read(path.parent)


def read(folder: Path) -> Landscape:
    """Return the landscape in a folder.

    Raises:
        ValueError: if some layout is missing or was measured less often than others.
    """
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
        sweep=sweep,
        table=table,
        step_time_ms=of_layout["step_time_ms"],
        peak_gib=of_layout["peak_gib"].max(axis=1),
        durations_s=np.median(of_layout["total_s"], axis=1),
    )


def _problem(folder: Path) -> tuple[Sweep, pd.DataFrame]:
    sweep = load_sweep(folder / "sweep.yaml", detect_cluster)
    return sweep, enumerate_layouts(sweep.workload, sweep.cluster, sweep.domain, lifted=sweep.lifted).table


def measure(folder: Path, seconds: float) -> None:
    """Measure what a folder's `trials.csv` lacks, and stop after the trial that runs when `seconds` are over."""
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
                knobs = {knob: getattr(layout, knob) for knob in varied}
                _append(path, {"repeat": repeat, "row": row, **knobs, **_measurements(result)})
                shutil.rmtree(trial.path)
                if result.versions:
                    _describe(folder, result)
    shutil.rmtree(work)


def _done(path: Path) -> set[tuple[int, int]]:
    if not path.exists():
        return set()
    trials = pd.read_csv(path, usecols=["repeat", "row"])
    return {(int(repeat), int(row)) for repeat, row in trials.itertuples(index=False)}


def _measurements(result: TrialResult) -> dict[str, Any]:
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
    """Write on which machine, and with which versions, the trials ran."""
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
