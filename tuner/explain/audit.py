"""What pruning keeps from ever being launched, row by row, and why: so that nothing is cut silently."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.choices import CHOICES
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.space.table import find_row
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial

TOO_LARGE: Final = "predicted too large"
DOMINATED: Final = "needs as much as an OOM"
AXES: Final = ("micro_batch_size", "recompute", "use_distributed_optimizer", "pp")
"""The choices along which a measured OOM rules out other layouts (tuner.predict.dominance)."""


def pruned_rows(
    table: pd.DataFrame, workload: Workload, cluster: Cluster, trials: Sequence[FinishedTrial] = ()
) -> pd.DataFrame:
    """The rows of a table of valid layouts that pruning removes, in the table's order and under its index.

    Beside the knobs: `reason`, TOO_LARGE or DOMINATED; `predicted_gib` and `fit`, the peak and the probability that it
    fits, before any trial; `trial`, the number of the OOM that rules the row out, else -1; `along`, the choices in
    which the row moved upwards from it. A row that was tried all the same (a baseline) is not among them.
    """
    fits = fit_probabilities(table, workload, cluster)
    left = ~_tried(table, trials)
    too_large = left & (fits < MIN_FIT)
    left &= ~too_large
    trial, along = np.full(len(table), -1), np.full(len(table), "", dtype=object)
    for row in trials:
        if row.result.outcome is not Outcome.OOM:
            continue
        ruled_out = left & needs_at_least_as_much_memory(table, row.layout, workload, cluster)
        left &= ~ruled_out
        trial[ruled_out] = row.number
        along[ruled_out] = _along(table[ruled_out], row.layout)
    gone = too_large | (trial >= 0)
    found = table[gone]
    return found.assign(
        reason=np.where(too_large, TOO_LARGE, DOMINATED)[gone],
        predicted_gib=peak_gib(found, workload, cluster, implementation_of(cluster)),
        fit=fits[gone],
        trial=trial[gone],
        along=along[gone],
    )


def _tried(table: pd.DataFrame, trials: Sequence[FinishedTrial]) -> NDArray[np.bool_]:
    mask = np.zeros(len(table), dtype=np.bool_)
    rows = [row for trial in trials if (row := find_row(table, trial.layout)) is not None]
    mask[rows] = True
    return mask


def _along(table: pd.DataFrame, layout: Layout) -> list[str]:
    """The choices in which each row differs from a layout."""
    moved = {
        axis: np.any([table[knob].to_numpy() != getattr(layout, knob) for knob in CHOICES[axis]], axis=0)
        for axis in AXES
    }
    return [", ".join(axis for axis in AXES if moved[axis][row]) for row in range(len(table))]
