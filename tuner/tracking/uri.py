"""Tracking URIs: which one a sweep uses, whether MLflow takes it, and how it is shown without its password."""

import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tuner.errors import InputError

_SCHEMES = frozenset({"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"})
"""The URI schemes that MLflow takes without a plugin. It refuses plain files since release 3.7."""

_SQLALCHEMY_PREFIX = "(raised as a result of"
"""The beginning of the first line of some errors of SQLAlchemy; that line says nothing about the cause."""

MAX_REASON = 1000
"""The largest number of characters in a reason. Assumed."""


def default_uri(results: Path) -> str:
    """Return the tracking URI of a sweep that states none: MLFLOW_TRACKING_URI, else SQLite in its folder."""
    # The path is absolute, since each process would resolve a relative one in its own working directory.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.absolute() / 'mlflow.db'}"


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that no MLflow store takes; no store is asked.

    Raises:
        InputError: naming the URI and what to write instead.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    schemes = _SCHEMES | {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    if scheme not in schemes:
        raise InputError(
            f"MLflow at {without_password(uri)} cannot be used: a tracking URI begins with one of "
            f"{', '.join(sorted(schemes))}. Correct tracking.uri in the sweep file, or the variable "
            "MLFLOW_TRACKING_URI; with both unset the sweep logs to SQLite in its results folder"
        )


def without_password(uri: str) -> str:
    """Return the URI as it may be shown: `***` replaces its password, and its query, in which ODBC's password lies."""
    parts = urlsplit(uri)
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{parts.username}:***@{host}")
    if parts.query:
        parts = parts._replace(query="***")
    # An unchanged URI is returned as it is: urlunsplit would drop a slash of sqlite:////tmp/x.
    return uri if parts == urlsplit(uri) else urlunsplit(parts)


def reason(error: BaseException, uri: str) -> str:
    """Return what an error of MLflow says, in one line of at most MAX_REASON characters without the URI's password."""
    text = (str(error).strip() or type(error).__name__).replace(uri, without_password(uri))
    lines = [line for line in text.splitlines() if not line.startswith(_SQLALCHEMY_PREFIX)]
    first_line = lines[0] if lines else text
    # requests and urllib3 wrap the cause three times.
    cause = re.search(r"""Caused by \w+\(["'].*?\): (.*)["']\)+$""", first_line)
    return (cause[1] if cause else first_line).rstrip(".")[:MAX_REASON]
