"""Finds or creates a sweep's experiment and MLflow run, and makes the tags that all MLflow runs of the sweep have."""

import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.git_utils import get_git_commit

from tuner.errors import InputError
from tuner.files import to_data, write_text
from tuner.sweep.configuration import Sweep
from tuner.sweep.tracking_uri import DATABASES, scheme_of, without_password
from tuner.tracking.names import KIND, SWEEP, SWEEP_ID


def common_tags(results: Path, sweep_name: str) -> dict[str, str]:
    """Return the tags that the MLflow run of the sweep in the folder `results` and those of its trials have."""
    tags = {SWEEP: sweep_name, SWEEP_ID: _sweep_id(results)}
    # A checkout on PYTHONPATH, as under Slurm, has no package version; its commit says more.
    with suppress(PackageNotFoundError):
        tags["megatune.version"] = version("megatune")
    commit = get_git_commit(str(Path.cwd()))
    return {**tags, "mlflow.source.git.commit": commit} if commit else tags


def _sweep_id(results: Path) -> str:
    """Return the id in the file `sweep_id` of a results folder; write the file with a random id if there is none.

    The id tells sweeps apart that have the same name on the same MLflow server.
    """
    path = results / "sweep_id"
    if not path.exists():
        write_text(path, f"{uuid.uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


def ensure_experiment(client: MlflowClient, uri: str, name: str, results: Path) -> str:
    """Return the id of the experiment with this name; create the experiment if it does not exist.

    Raises:
        InputError: if the experiment is deleted: MLflow allows no other experiment with the name of a deleted one.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server MLflow would put artifacts under the working directory of the process that logs first.
        location = (results / "mlartifacts").as_uri() if scheme_of(uri) in DATABASES else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another sweep may have created it in the meantime.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise InputError(
            f"experiment '{name}' is deleted, and MLflow keeps its name: restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}) or name another one (tracking.experiment in the sweep file)"
        )
    return str(experiment.experiment_id)


def ensure_sweep_run(client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    """Return the id of the sweep's MLflow run; create the MLflow run if it does not exist.

    `tags` must hold SWEEP_ID, by which the MLflow run is found. An existing MLflow run is updated with `tags`.
    """
    query = f"tags.`{SWEEP_ID}` = '{tags[SWEEP_ID]}' and tags.`{KIND}` = 'sweep'"
    runs = client.search_runs([experiment_id], query, max_results=1)
    if not runs:
        return str(client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id)
    run_id = str(runs[0].info.run_id)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run_id


def public_sweep(sweep: Sweep) -> dict[str, Any]:
    """Return the sweep's configuration as JSON data that others may read: without the password in its tracking URI."""
    uri = sweep.tracking.uri
    tracking = replace(sweep.tracking, uri=uri and without_password(uri))
    data: dict[str, Any] = to_data(replace(sweep, tracking=tracking))
    return data
