"""Makes one table of a sweep's trials, with their outcomes, measurements and knobs."""

from collections.abc import Sequence
from typing import Any, Final

import pandas as pd

from tuner.core.layout import KNOBS
from tuner.trial.finished import FinishedTrial

MEASURED: Final = (
    "step_time_ms",
    "step_time_low_ms",
    "step_time_high_ms",
    "tokens_per_s_per_gpu",
    "model_tflops_per_s_per_gpu",
    "mfu",
    "peak_allocated_gib",
    "peak_reserved_gib",
)
"""The fields of Metrics that are columns of the table."""
COLUMNS: Final = (
    "number",
    "source",
    "outcome",
    "label",
    *MEASURED,
    "total_s",
    "finished_at",
    "reason",
    "note",
    *KNOBS,
)


def trial_table(trials: Sequence[FinishedTrial]) -> pd.DataFrame:
    """Return a table with the columns COLUMNS and one row per trial, in the given order.

    Measurements are NaN for a trial that did not complete.
    """
    table = pd.DataFrame([_record(trial) for trial in trials], columns=list(COLUMNS))
    return table.astype(dict.fromkeys(MEASURED, float))


def _record(trial: FinishedTrial) -> dict[str, Any]:
    result, metrics = trial.result, trial.result.metrics
    return {
        "number": trial.number,
        "source": trial.source,
        "outcome": result.outcome.value,
        "label": trial.layout.label(),
        **{name: getattr(metrics, name, None) for name in MEASURED},
        "total_s": result.durations.total_s,
        "finished_at": result.finished_at,
        "reason": result.reason,
        "note": trial.note,
        **{knob: getattr(trial.layout, knob) for knob in KNOBS},
    }
