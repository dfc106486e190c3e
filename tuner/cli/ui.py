"""megatune ui: serves the MLflow UI of a sweep."""

import os
import sys
from typing import Annotated

import typer

from tuner.cli.common import ResultsFolder, results_folder, stderr
from tuner.errors import InputError


def ui(
    results: ResultsFolder,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="The port that the UI listens on.")
    ] = 5000,
) -> None:
    """Serve the MLflow UI of a sweep on 127.0.0.1 until Ctrl-C."""
    from tuner.tracking.uri import default_uri

    folder = results_folder(results)
    configured = folder.sweep().tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if configured and configured.startswith("http"):
        raise InputError(f"this sweep is tracked on an MLflow server; open {configured} in a browser")
    uri = configured or default_uri(folder.path)
    stderr.print(f"MLflow of {folder.path} on http://127.0.0.1:{port} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"])
