"""megatune ui: serves the MLflow UI of a sweep."""

import os
import sys
from typing import Annotated

import typer

from tuner.cli.common import ResultsFolder, TrackingUri, results_folder, stderr
from tuner.errors import InputError


def ui(
    results: ResultsFolder,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="The port that the UI listens on.")
    ] = 5000,
    uri: TrackingUri = None,
) -> None:
    """Serve the MLflow UI of a sweep on 127.0.0.1 until Ctrl-C."""
    from tuner.sweep.tracking_uri import scheme_of, without_password
    from tuner.tracking.own_store import is_own_store, refuse_places_outside
    from tuner.tracking.uri import trusted_uri

    folder = results_folder(results)
    chosen = trusted_uri(folder, uri)
    if scheme_of(chosen) in {"http", "https"}:
        raise InputError(
            f"this sweep is tracked on an MLflow server; open {without_password(chosen)} in a browser"
        )
    if is_own_store(folder.path, chosen):
        refuse_places_outside(folder)
    stderr.print(f"MLflow of {folder.path} on http://127.0.0.1:{port} (Ctrl-C ends it)", markup=False)
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    # Every user of the machine can read the arguments of a process, and a URI may hold a password.
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": chosen}
    os.execve(sys.executable, [*command, "--workers", "1"], environment)
