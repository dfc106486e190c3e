"""What the predictions and the trials of a sweep together say about every row of its table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.columns import Floats
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
from tuner.space.table import RowIndex, with_rows
from tuner.sweep.configuration import Sweep
from tuner.trial.finished import FinishedTrial


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evidence:
    """A sweep, its trials, and what is known about every row of its table; arrays have shape [rows] unless stated."""

    sweep: Sweep
    calibration: Calibration | None
    """The machine's calibration that the predicted step times rest on; None if there is none."""
    trials: tuple[FinishedTrial, ...]
    """The finished trials."""
    table: pd.DataFrame
    """The valid layouts, the layouts of the trials included, one row per layout, columns as KNOBS."""
    rows: NDArray[np.intp]
    """The row of each trial, of shape [trials]."""
    predicted_ms: Floats
    """The step time that is predicted before any trial."""
    predicted_gib: Floats
    """The peak of memory that is predicted before any trial."""
    predicted_fit: Floats
    """The probability, before any trial, that the peak is at most the GPU's memory."""
    expected_ms: Floats
    """The predicted step time, corrected by the trials."""
    fit: Floats
    """The probability that the peak is at most the GPU's memory, corrected by the trials."""


def gather(
    sweep: Sweep,
    trials: Sequence[FinishedTrial],
    layouts: Sequence[Layout] = (),
    calibration: Calibration | None = None,
) -> Evidence:
    """Gather the evidence of a sweep.

    Args:
        sweep: the sweep.
        trials: its finished trials.
        layouts: further layouts that the table is to hold.
        calibration: the machine's calibration, for predicted step times.
    """
    workload, cluster = sweep.workload, sweep.cluster
    tried = [trial.layout for trial in trials]
    table = with_rows(searched_table(sweep.problem, trials), [*tried, *layouts])
    index = RowIndex(table)
    rows = np.array([index.find(layout) for layout in tried], dtype=np.intp)
    implementation = implementation_of(cluster)
    predicted_ms = step_time_ms(table, workload, cluster, implementation, calibration)
    feasibility, ranking = Feasibility(table, workload, cluster), Ranking(encode(table), predicted_ms)
    predicted_fit = feasibility.probabilities()
    for row, trial in zip(rows.tolist(), trials, strict=True):
        _learn(ranking, feasibility, row, Observation.of(trial.result))
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


def _learn(ranking: Ranking, feasibility: Feasibility, row: int, observation: Observation) -> None:
    if observation.step_time_ms is not None:
        ranking.tell(row, observation.step_time_ms)
    elif observation.slower_than_ms is not None:
        ranking.tell_slower(row, observation.slower_than_ms)
    if observation.out_of_memory or observation.peak_gib is not None:
        feasibility.tell(row, observation.peak_gib)
