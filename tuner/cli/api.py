"""What the commands do, for Python: load a sweep, plan it, run it, read its answer, export it.

The names are exported by `tuner` itself (`tuner.load_sweep`, ...); docs/python.md shows them at work.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tuner.analysis.answer import Answer
from tuner.analysis.answer import answer as answer_of
from tuner.cli.export import override
from tuner.cli.planning import Loaded, as_installed, detect, prepare, read_recipe, read_sweep
from tuner.cli.session import SweepEnd, run_sweep
from tuner.errors import InputError
from tuner.files import parse
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.predict.time.step import step_time_ms
from tuner.report.export import Format
from tuner.search.grid import grid_space
from tuner.sweep.configuration import Sweep, SweepFile
from tuner.sweep.folder import SweepFolder
from tuner.sweep.resolution import resolve
from tuner.sweep.sinks import Sink
from tuner.trial.finished import read_trials


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        InputError: naming the file and the key that is wrong.
    """
    return read_sweep(Path(path))


def build_sweep(**keys: Any) -> Sweep:
    """Build a sweep from the keys of a sweep file: `build_sweep(name="night", workload={...}, cluster="dgx-h100")`.

    Relative paths among the values start at the working directory.

    Raises:
        InputError: naming the key that is wrong.
    """
    sweep = resolve(parse(SweepFile, keys, "the sweep"), "the sweep", Path(), detect, read_recipe)
    return as_installed(sweep)


def plan(sweep: Sweep) -> pd.DataFrame:
    """Every valid layout of a sweep's grid with its predictions, the lowest predicted step time first.

    Returns:
        One row per layout: a column per knob, then `predicted_ms` (step time), `predicted_gib` (peak memory allocated
        on the worst rank) and `fit` (the probability that the layout fits the GPU's memory).
    """
    table = grid_space(sweep.problem).table
    workload, cluster = sweep.workload, sweep.cluster
    implementation = implementation_of(cluster)
    predicted = table.assign(
        predicted_ms=step_time_ms(table, workload, cluster, implementation),
        predicted_gib=peak_gib(table, workload, cluster, implementation),
        fit=fit_probabilities(table, workload, cluster),
    )
    order = np.argsort(predicted["predicted_ms"].to_numpy(), kind="stable")
    return predicted.iloc[order].reset_index(drop=True)


def run(
    sweep: Sweep,
    *,
    results: str | Path = "results",
    observer: Sink | None = None,
    stop: threading.Event | None = None,
) -> SweepEnd:
    """Run a sweep on this machine, or go on with it, until it ends: what `megatune sweep` does.

    Args:
        sweep: What to measure.
        results: The folder that holds one folder per sweep.
        observer: A sink that is told of every trial as it begins and ends.
        stop: Set it, from another thread or a signal handler, to end the running trial and the sweep.

    Raises:
        InputError: if the sweep cannot run here.
        NothingFeasibleError: if every layout is predicted to run out of memory.
    """
    source = Path(sweep.name)
    prepared = prepare(Loaded(sweep, grid_space(sweep.problem)), source)
    sinks: Sequence[Sink] = () if observer is None else (observer,)
    folder = SweepFolder(Path(results) / sweep.name)
    deadline = folder.read_deadline()
    return run_sweep(sweep, prepared, folder, stop=stop or threading.Event(), sinks=sinks, deadline=deadline)


def answer(results: str | Path) -> Answer | None:
    """The answer of a sweep's results folder: the ranking of its layouts; None if no layout was measured.

    Raises:
        InputError: if the folder holds no sweep, or a file in it cannot be read.
    """
    return answer_of(read_trials(_folder(results).path))


def export(results: str | Path, *, format: str | None = None, trial: int | None = None) -> str:
    """The override that selects the best measured layout, ready to paste.

    Args:
        results: The sweep's results folder.
        format: `bridge-cli`, `bridge-python`, `bridge-yaml`, `megatron-lm` or `json`; None takes that of the program.
        trial: The number of the trial to export; None exports the best one.

    Raises:
        InputError: if there is no such format or trial.
        NothingFeasibleError: if no trial completed.
    """
    folder = _folder(results)
    formats = [known.value for known in Format]
    if format is not None and format not in formats:
        raise InputError(f"format '{format}': is none of {', '.join(formats)}")
    chosen = None if format is None else Format(format)
    return override(folder, read_trials(folder.path), chosen, trial)


def _folder(results: str | Path) -> SweepFolder:
    folder = SweepFolder(Path(results))
    folder.sweep()  # raises if the folder holds none
    return folder
