"""Tracking URIs: which one is meant, whether MLflow can take it, and how it may be shown."""

import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tuner.errors import InputError
from tuner.tracking.spool import Status as Status

_SCHEMES = frozenset({"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"})
"""Of tracking URIs that MLflow takes without a plugin; it refuses plain files since 3.7."""


_SQLALCHEMY_ASIDE = "(raised as a result of"
"""How a first line begins that says nothing of what happened."""


def default_uri(results: Path) -> str:
    """Where MLflow is without a stated URI: MLFLOW_TRACKING_URI, else SQLite in the sweep's folder."""
    # Absolute, since MLflow takes a relative one from the working directory of whoever asks.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.absolute() / 'mlflow.db'}"


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that no MLflow store takes, without asking anything of it.

    Raises:
        InputError: naming the URI and what to write instead.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    known = _SCHEMES | {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    if scheme not in known:
        raise InputError(
            f"MLflow at {without_password(uri)} cannot be used: a tracking URI begins with one of "
            f"{', '.join(sorted(known))}. Correct tracking.uri in the sweep file, or the variable MLFLOW_TRACKING_URI; "
            "with both unset the sweep logs to SQLite in its results folder"
        )


def without_password(uri: str) -> str:
    """The URI as it may be shown; ODBC's holds its password in the query."""
    parts = urlsplit(uri)
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{parts.username}:***@{host}")
    if parts.query:
        parts = parts._replace(query="***")
    # Put together again, sqlite:////tmp/x would lose a slash.
    return uri if parts == urlsplit(uri) else urlunsplit(parts)


def reason(error: BaseException, uri: str) -> str:
    """What an error of MLflow says, in one line and without a password."""
    text = (str(error).strip() or type(error).__name__).replace(uri, without_password(uri))
    lines = [line for line in text.splitlines() if not line.startswith(_SQLALCHEMY_ASIDE)]
    told = lines[0] if lines else text
    # The libraries below wrap what happened three times.
    cause = re.search(r"""Caused by \w+\(["'].*?\): (.*)["']\)+$""", told)
    return (cause[1] if cause else told).rstrip(".")[:1000]
