"""megatune sync: what MLflow missed of a sweep."""

from typing import Annotated

import typer

from tuner.cli.common import ResultsFolder, results_folder, stderr
from tuner.errors import InputError


def sync(
    results: ResultsFolder,
    uri: Annotated[
        str | None,
        typer.Option("--uri", help="The MLflow tracking URI; else the one that the sweep would take."),
    ] = None,
) -> None:
    """Log what MLflow misses of a sweep, running or finished; what it holds already stays as it is."""
    from tuner.tracking.spool import Entry, Spool
    from tuner.tracking.uri import check_uri, default_uri, reason, without_password

    folder = results_folder(results)
    chosen = uri or folder.sweep().tracking.uri or default_uri(folder.path)
    shown = without_password(chosen)
    check_uri(chosen)
    spool, held = Spool(folder.path), 0

    def count(entry: Entry) -> None:
        nonlocal held
        held += 1

    try:
        from tuner.tracking.runs import MlflowRuns  # late: it takes seconds

        MlflowRuns.open(folder, chosen).catch_up(spool, count)
    # A wrong URI or a server that is down raises SQLAlchemy's, requests' and import errors beside MLflow's.
    except Exception as error:
        raise InputError(
            f"{held} of {len(spool.entries()[0])} trials of {folder.path} are known to be in MLflow at {shown}: "
            f"{reason(error, chosen)}. Nothing is lost: run the same command again once that is mended, "
            "or name another MLflow with --uri"
        ) from None
    stderr.print(f"all {held} trials of {folder.path} are in MLflow at {shown}", markup=False)
