"""Tracking URIs: which one a sweep uses, and on whose word; whether MLflow takes it; what MLflow's errors say."""

import os
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

from tuner.errors import InputError
from tuner.printable import one_line
from tuner.sweep.folder import SweepFolder
from tuner.sweep.tracking_uri import refuse_password, scheme_of, secrets_of, without_password
from tuner.tracking.memory import GROWTH_GIB
from tuner.tracking.own_store import is_own_store, own_store

_SCHEMES = frozenset({"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"})
"""The URI schemes that MLflow takes without a plugin. It refuses plain files since release 3.7."""

_SQLALCHEMY_PREFIX = "(raised as a result of"
"""The beginning of the first line of some errors of SQLAlchemy; that line says nothing about the cause."""

_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""The variables from which MLflow takes what a server wants to know."""

_HEADER = re.compile(r"\b(Basic|Bearer) [\w.~+/=-]+")
"""Matches the value of a request's header Authorization."""

MAX_REASON = 1000
"""The largest number of characters in a reason. Assumed."""


def chosen_uri(results: Path, stated: str | None) -> str:
    """Return the tracking URI of a sweep.

    Args:
        results: the sweep's results folder.
        stated: the URI that the user states, in the sweep file or on the command line. None takes the variable
            MLFLOW_TRACKING_URI, and without it SQLite in the results folder. A variable that names the same place as
            `stated` is taken too, since it may hold the password.
    """
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    if stated is None:
        return variable or own_store(results)
    return variable if variable and without_password(variable) == stated else stated


def trusted_uri(folder: SweepFolder, given: str | None) -> str:
    """Return the tracking URI for a command that reads a results folder, which somebody else may have written.

    The URI that the folder names is used only if it is the folder's own store, or if this user names the same place.

    Args:
        folder: the results folder.
        given: the URI on the command line; None if there is none.

    Raises:
        InputError: if the URI on the command line holds a password, or the folder names another place than the user.
    """
    if given is not None:
        refuse_password(given, "--uri")
        return chosen_uri(folder.path, given)
    named = folder.sweep().tracking.uri
    if named is None:
        return chosen_uri(folder.path, None)
    if is_own_store(folder.path, named):
        return own_store(folder.path)
    place = without_password(named)
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    if variable and without_password(variable) == place:
        return variable
    here = "MLFLOW_TRACKING_URI is not set" if not variable else "MLFLOW_TRACKING_URI names another one"
    raise InputError(
        f"{folder.identity}: names the MLflow at {one_line(place)}, and {here}: if you trust that place, add "
        f"--uri {one_line(shlex.quote(place))}, and otherwise --uri with the MLflow to use; "
        f"{own_store(folder.path)} is the results folder's own"
    )


def check_uri(uri: str) -> None:
    """Refuse a tracking URI that no MLflow store takes; no store is asked.

    Raises:
        InputError: naming the URI and what to write instead.
    """
    schemes = _SCHEMES | {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    if scheme_of(uri) not in schemes:
        raise InputError(
            f"MLflow at {without_password(uri)} cannot be used: a tracking URI begins with one of "
            f"{', '.join(sorted(schemes))}. Correct tracking.uri in the sweep file, or the variable "
            "MLFLOW_TRACKING_URI; with both unset the sweep logs to SQLite in its results folder"
        )


def without_secrets(text: str, uri: str) -> str:
    """Return a text of MLflow with `***` in place of the secrets of the tracking URI and of MLflow's variables.

    A server may quote the header that a request carries, with a secret from MLflow's file of credentials.
    """
    text = _HEADER.sub(r"\1 ***", text.replace(uri, without_password(uri)))
    for secret in (*secrets_of(uri), *filter(None, map(os.environ.get, _SECRET_VARIABLES))):
        text = text.replace(secret, "***")
    return text


def reason(error: BaseException, uri: str) -> str:
    """Return what an error of MLflow says, in one line of at most MAX_REASON characters without secrets."""
    if _is_out_of_memory(error):
        return f"it needs more than {GROWTH_GIB:g} GiB of memory, as for an answer without an end"
    text = without_secrets(str(error).strip() or type(error).__name__, uri)
    lines = [line for line in text.splitlines() if not line.startswith(_SQLALCHEMY_PREFIX)]
    first_line = lines[0] if lines else text
    # requests and urllib3 wrap the cause three times.
    cause = re.search(r"""Caused by \w+\(["'].*?\): (.*)["']\)+$""", first_line)
    return one_line((cause[1] if cause else first_line).rstrip("."))[:MAX_REASON]


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or the one that led to it, says that the process has no memory left."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
