"""Computes the parameters, metrics and tags of a trial's MLflow run; their names are in `tuner.tracking.names`."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from tuner.files import to_data
from tuner.tracking.names import KIND, METRICS, PARAMETERS, TRIAL, Measure
from tuner.trial.contract import TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial
from tuner.trial.program import program_name

MAX_TEXT = 5000
"""The most characters in a tag. Assumed; MLflow silently cuts a tag of more than 8000."""


class Point(NamedTuple):
    """One value of an MLflow metric."""

    name: str
    value: float
    step: int
    """The value's position in the metric's series, from 0; 0 for a metric that is no series."""


def config_hash(spec: TrialSpec) -> str:
    """Return a hash of a trial's workload, cluster, layout and program; equal for equal trials of different sweeps."""
    parts = {name: to_data(getattr(spec, name)) for name in ("workload", "cluster", "layout")}
    data = {**parts, "program": to_data(spec)["program"]}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def trial_parameters(spec: TrialSpec) -> dict[str, str]:
    """Return the parameters of a trial's MLflow run, as text by parameter name."""
    return {fact.name: str(fact.value(spec)) for fact in PARAMETERS}


def trial_metrics(result: TrialResult, measures: Iterable[Measure] = METRICS) -> list[Point]:
    """Return the points of those `measures` that a trial has measured."""
    return [
        Point(measure.name, float(value), step)
        for measure in measures
        for step, value in enumerate(_values(result, measure))
    ]


def _values(result: TrialResult, measure: Measure) -> tuple[float, ...]:
    """Return the values of a metric; empty if the trial did not measure it."""
    value: Any = result
    for name in measure.path.split("."):
        value = None if value is None else getattr(value, name)
    if value is None:
        return ()
    if measure.is_count:
        return (len(value),)
    return value if isinstance(value, tuple) else (value,)


def trial_tags(spec: TrialSpec, trial: FinishedTrial, folder: TrialFolder) -> dict[str, str]:
    """Return the tags of a trial's MLflow run that say what was run and how it ended; tags without text are left out.

    The tags of `tuner.tracking.sweep_run.common_tags` and the trial's RECORD are not among them.
    """
    result = trial.result
    tags = {
        KIND: "trial",
        TRIAL: str(trial.number),
        "megatune.attempt": str(spec.attempt),
        "megatune.layout": trial.layout.label(),
        "megatune.outcome": result.outcome.value,
        "megatune.reason": result.reason,
        "megatune.phase": result.phase or "",
        "megatune.rank": "" if result.rank is None else str(result.rank),
        "megatune.source": trial.source,
        "megatune.source_note": trial.note,
        "megatune.suspicions": "; ".join(result.suspicions),
        "megatune.throttle_reasons": " ".join(result.telemetry.throttle_reasons if result.telemetry else ()),
        "megatune.config_hash": config_hash(spec),
        "megatune.program": program_name(spec.program),
        "megatune.device": result.device_name,
        "megatune.folder": str(folder.path.absolute()),
        "mlflow.note.content": f"**{result.outcome.value}** {result.reason}",
        **{f"megatune.versions.{name}": text for name, text in result.versions.items()},
    }
    return {name: clip(text) for name, text in tags.items() if text}


def clip(text: str) -> str:
    """Return a text cut to at most MAX_TEXT characters; a text that was cut ends with ` ...`."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 4] + " ..."
