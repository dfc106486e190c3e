"""Which rows pruning keeps from ever being launched, and why, so that no row is removed silently."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd

from tuner.core.choices import CHOICES
from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.predict.dominance import dominating
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.space.table import RowIndex
from tuner.trial.finished import FinishedTrial

TOO_LARGE: Final = "predicted too large"
DOMINATED: Final = "needs as much as an OOM"
AXES: Final = ("micro_batch_size", "recompute", "use_distributed_optimizer", "pp")
"""The choices along which a measured OOM rules out other layouts (tuner.predict.dominance)."""


def pruned_rows(
    table: pd.DataFrame, workload: Workload, cluster: Cluster, trials: Sequence[FinishedTrial] = ()
) -> pd.DataFrame:
    """Return the rows of a table of valid layouts that pruning removes, in the table's order and with its index.

    Rows that were tried, a baseline for instance, are not removed.

    Returns:
        The removed rows with these columns besides the knobs: `reason`, TOO_LARGE or DOMINATED; `predicted_gib`, the
        peak predicted before any trial; `fit`, the probability before any trial that this peak fits; `trial`, the
        number of the OOM trial that rules the row out, or -1; `along`, the choices in which the row differs from that
        trial.
    """
    fits = fit_probabilities(table, workload, cluster)
    left = ~_tried(table, trials)
    too_large = left & (fits < MIN_FIT)
    left &= ~too_large
    columns = Columns.of(table)
    oom_number, along = np.full(len(table), -1), np.full(len(table), "", dtype=object)
    for trial in trials:
        if not trial.result.is_too_large:
            continue
        ruled_out = left & dominating(columns, trial.layout, workload, cluster)
        left &= ~ruled_out
        oom_number[ruled_out] = trial.number
        along[ruled_out] = _differing_axes(table[ruled_out], trial.layout)
    is_pruned = too_large | (oom_number >= 0)
    pruned = table[is_pruned]
    return pruned.assign(
        reason=np.where(too_large, TOO_LARGE, DOMINATED)[is_pruned],
        predicted_gib=peak_gib(pruned, workload, cluster, implementation_of(cluster)),
        fit=fits[is_pruned],
        trial=oom_number[is_pruned],
        along=along[is_pruned],
    )


def _tried(table: pd.DataFrame, trials: Sequence[FinishedTrial]) -> Bools:
    mask, index = np.zeros(len(table), dtype=np.bool_), RowIndex(table)
    rows = [row for trial in trials if (row := index.find(trial.layout)) is not None]
    mask[rows] = True
    return mask


def _differing_axes(table: pd.DataFrame, layout: Layout) -> list[str]:
    """Return for each row the axes in which it differs from a layout, joined by commas."""
    differs = {
        axis: np.any([table[knob].to_numpy() != getattr(layout, knob) for knob in CHOICES[axis]], axis=0)
        for axis in AXES
    }
    return [", ".join(axis for axis in AXES if differs[axis][row]) for row in range(len(table))]
