"""Chooses a sweep's tracking URI, checks that MLflow supports it, and turns MLflow's errors into one-line reasons."""

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
"""The URI schemes that MLflow supports without a plugin. Since release 3.7, MLflow refuses the scheme `file`."""

_SQLALCHEMY_PREFIX = "(raised as a result of"
"""How the first line of some SQLAlchemy errors begins; that line does not state the cause."""

_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""The environment variables from which MLflow takes the password or token for a server."""

_HEADER = re.compile(r"\b(Basic|Bearer) [\w.~+/=-]+")
"""Matches the value of the HTTP header Authorization, such as `Bearer TOKEN`."""

MAX_REASON = 1000
"""The most characters in the text that `reason` returns. Assumed."""


def chosen_uri(results: Path, stated: str | None) -> str:
    """Return the tracking URI of a sweep.

    Args:
        results: the sweep's results folder.
        stated: the URI in the sweep file or on the command line; None if the user states none.

    Returns:
        `stated`. If it is None, the environment variable MLFLOW_TRACKING_URI, or the SQLite store in the results
        folder if the variable is not set. If the variable equals `stated` but for a password, the variable.
    """
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    if stated is None:
        return variable or own_store(results)
    return variable if variable and without_password(variable) == stated else stated


def trusted_uri(folder: SweepFolder, given: str | None) -> str:
    """Return the tracking URI for a command that reads a results folder, which somebody else may have written.

    Without a URI on the command line, the URI in the folder's sweep.json is used only if it names the SQLite store in
    the folder, or the same place as this user's environment variable MLFLOW_TRACKING_URI. If sweep.json has none,
    `chosen_uri` chooses.

    Args:
        folder: the results folder.
        given: the URI on the command line; None if there is none.

    Raises:
        InputError: if `given` holds a password, or sweep.json names a place that may not be used.
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
    """Check that MLflow or one of its plugins supports the scheme of a tracking URI, without connecting to it.

    Raises:
        InputError: if the scheme is not supported. The error names the URI and what to write instead.
    """
    schemes = _SCHEMES | {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    if scheme_of(uri) not in schemes:
        raise InputError(
            f"MLflow at {without_password(uri)} cannot be used: a tracking URI begins with one of "
            f"{', '.join(sorted(schemes))}. Correct tracking.uri in the sweep file, or the variable "
            "MLFLOW_TRACKING_URI; with both unset the sweep logs to SQLite in its results folder"
        )


def without_secrets(text: str, uri: str) -> str:
    """Return a text from MLflow with `***` in place of every secret: those in the tracking URI and in the environment.

    The value of an Authorization header is replaced, too: a server may quote it, and its secret may come from MLflow's
    credentials file.
    """
    text = _HEADER.sub(r"\1 ***", text.replace(uri, without_password(uri)))
    for secret in (*secrets_of(uri), *filter(None, map(os.environ.get, _SECRET_VARIABLES))):
        text = text.replace(secret, "***")
    return text


def reason(error: BaseException, uri: str) -> str:
    """Return the message of an error from MLflow as one line of at most MAX_REASON characters, without secrets.

    `uri` is the tracking URI, whose secrets the message may quote.
    """
    if _is_out_of_memory(error):
        return f"it needs more than {GROWTH_GIB:g} GiB of memory, as if the server's answer had no end"
    text = without_secrets(str(error).strip() or type(error).__name__, uri)
    lines = [line for line in text.splitlines() if not line.startswith(_SQLALCHEMY_PREFIX)]
    first_line = lines[0] if lines else text
    # requests and urllib3 wrap the cause three times.
    cause = re.search(r"""Caused by \w+\(["'].*?\): (.*)["']\)+$""", first_line)
    return one_line((cause[1] if cause else first_line).rstrip("."))[:MAX_REASON]


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or any error in its chain of causes and contexts, is a MemoryError."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
