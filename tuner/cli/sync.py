"""megatune sync: logs the trials of a sweep that MLflow lacks."""

from tuner.cli.common import ResultsFolder, TrackingUri, results_folder, stderr
from tuner.errors import InputError


def sync(results: ResultsFolder, uri: TrackingUri = None) -> None:
    """Log to MLflow the trials of a running or finished sweep that it lacks; it keeps those it holds as they are."""
    from tuner.sweep.tracking_uri import without_password
    from tuner.tracking.connection import open_runs
    from tuner.tracking.memory import bounded_memory
    from tuner.tracking.spool import Entry, Spool
    from tuner.tracking.uri import check_uri, reason, trusted_uri

    folder = results_folder(results)
    chosen = trusted_uri(folder, uri)
    shown = without_password(chosen)
    check_uri(chosen)
    spool, logged = Spool(folder.path), list[Entry]()

    try:
        with bounded_memory():
            open_runs(folder, chosen).catch_up(spool, logged.append)
    # A wrong URI, or a server that is down, raises errors of SQLAlchemy, of requests and of imports as well.
    except Exception as error:
        raise InputError(
            f"{len(logged)} of {len(spool.entries()[0])} trials of {folder.path} are known to be in MLflow at {shown}: "
            f"{reason(error, chosen)}. Nothing is lost: run the same command again once MLflow answers, "
            "or name another MLflow with --uri"
        ) from None
    stderr.print(f"all {len(logged)} trials of {folder.path} are in MLflow at {shown}", markup=False)
