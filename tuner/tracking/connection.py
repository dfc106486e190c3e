"""Connects to MLflow, after setting the environment variables that MLflow reads when it is imported."""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuner.sweep.folder import SweepFolder
from tuner.tracking.own_store import is_own_store, refuse_places_outside

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tuner.tracking.runs import MlflowRuns

MLFLOW_ENVIRONMENT: Mapping[str, str] = {
    # The tuner reports nothing to anybody, and clusters are often cut off from the internet.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own limits add up to many minutes per call, and a request that it repeats may create an MLflow run twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment variables that this process sets for MLflow unless the user has set them. Assumed: the timeout, 10 s."""


def connect(uri: str) -> "MlflowClient":
    """Return an MLflow client for a tracking URI. The first call imports MLflow, which takes seconds."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Errors are raised; the log would fill the terminal with migrations, retries and tracebacks. The import of MLflow
    # sets the levels too, so this comes after it.
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri)


def open_runs(folder: SweepFolder, uri: str) -> "MlflowRuns":
    """Connect to the MLflow at a tracking URI, and find or create the sweep's MLflow run in it.

    Raises:
        InputError: if the URI names the SQLite store in the results folder, and that store keeps files outside the
            folder; also for the reasons of `MlflowRuns.open`.
    """
    if is_own_store(folder.path, uri):
        refuse_places_outside(folder)
    client = connect(uri)
    from tuner.tracking.runs import MlflowRuns

    return MlflowRuns.open(client, folder, uri)
