"""What the predictions and the trials of a sweep together say of every row of its table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.layout import Layout
from tuner.predict.calibration import Calibration
from tuner.predict.feasibility import Feasibility
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.predict.time.step import step_time_ms
from tuner.search.encoding import encode
from tuner.search.observation import Observation
from tuner.search.ranking import Ranking
from tuner.search.refinement import searched_table
from tuner.space.table import find_row, with_row
from tuner.sweep.configuration import Sweep
from tuner.trial.finished import FinishedTrial

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evidence:
    """A sweep, its trials, and what is known of every row of its table; arrays of one value a row."""

    sweep: Sweep
    calibration: Calibration | None
    """What the predicted step times rest on."""
    trials: tuple[FinishedTrial, ...]
    """The finished ones."""
    table: pd.DataFrame
    """The valid layouts, those of the trials among them."""
    rows: NDArray[np.intp]
    """The row of each trial."""
    predicted_ms: Floats
    """Before any trial; likewise the next two."""
    predicted_gib: Floats
    predicted_fit: Floats
    """P(peak <= the GPU's memory)."""
    expected_ms: Floats
    """What the trials make of `predicted_ms`."""
    fit: Floats
    """What they make of `predicted_fit`."""


def gather(
    sweep: Sweep,
    trials: Sequence[FinishedTrial],
    layouts: Sequence[Layout] = (),
    calibration: Calibration | None = None,
) -> Evidence:
    """Gather the evidence of a sweep's finished trials; `layouts` are further rows to judge."""
    workload, cluster = sweep.workload, sweep.cluster
    table = searched_table(sweep.problem, trials)
    for layout in (*(trial.layout for trial in trials), *layouts):
        table = with_row(table, layout)
    rows = np.array([find_row(table, trial.layout) for trial in trials], dtype=np.intp)
    implementation = implementation_of(cluster)
    predicted_ms = step_time_ms(table, workload, cluster, implementation, calibration)
    feasibility, ranking = Feasibility(table, workload, cluster), Ranking(encode(table), predicted_ms)
    predicted_fit = feasibility.probabilities()
    for row, trial in zip(rows.tolist(), trials, strict=True):
        seen = Observation.of(trial.result)
        if seen.step_time_ms is not None:
            ranking.tell(row, seen.step_time_ms)
        elif seen.slower_than_ms is not None:
            ranking.tell_slower(row, seen.slower_than_ms)
        if seen.out_of_memory or seen.peak_gib is not None:
            feasibility.tell(row, seen.peak_gib)
    return Evidence(
        sweep=sweep,
        calibration=calibration,
        trials=tuple(trials),
        table=table,
        rows=rows,
        predicted_ms=predicted_ms,
        predicted_gib=peak_gib(table, workload, cluster, implementation),
        predicted_fit=predicted_fit,
        expected_ms=ranking.expected_ms(np.arange(len(table))),
        fit=feasibility.probabilities(),
    )
