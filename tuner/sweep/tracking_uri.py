"""What may be kept and shown of a tracking URI: its place, never its password."""

import re
from urllib.parse import parse_qsl, unquote

from tuner.errors import InputError

DATABASES = frozenset({"sqlite", "postgresql", "mysql", "mssql"})
"""The URI schemes of MLflow's stores without a server."""

_CREDENTIALS = re.compile(r"(?P<scheme>[^:/?#@]*:/*+)?+(?P<user>[^:/?#@]*)(?P<password>:.*)?@", re.DOTALL)
"""Matches the beginning of a URI up to its host, if it names a user. The password may hold any character."""


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI without its driver, as `postgresql` of `postgresql+psycopg://host/x`."""
    return uri.partition(":")[0].partition("+")[0]


def without_password(uri: str) -> str:
    """Return the URI as it may be kept and shown.

    It lacks the password, and the query, which may hold a password or a token as well. The URI of a server also lacks
    its user, which may be a token; the user of a database remains, since it belongs to the database's name.
    """
    is_database = scheme_of(uri) in DATABASES
    if match := _CREDENTIALS.match(uri):
        user = f"{match['user']}@" if is_database else ""
        uri = f"{match['scheme'] or ''}{user}{uri[match.end() :]}"
    # The path of a SQLite file may hold a #.
    return re.split(r"\?" if is_database else r"[?#]", uri, maxsplit=1)[0]


def secrets_of(uri: str) -> list[str]:
    """Return the texts that give away what `without_password` leaves out, the longest first."""
    match = _CREDENTIALS.match(uri)
    query = re.split("[?#]", uri, maxsplit=1)[1:]
    texts = [uri, *query, *(value for _, value in parse_qsl("".join(query)))]
    if match:
        texts += [(match["password"] or "")[1:], *([] if scheme_of(uri) in DATABASES else [match["user"]])]
    kept = without_password(uri)
    decoded = {text for raw in texts for text in (raw, unquote(raw)) if text and text not in kept}
    return sorted(decoded, key=len, reverse=True)


def refuse_password(uri: str | None, where: str) -> None:
    """Refuse a URI that cannot be kept as it is; None is no URI.

    Args:
        uri: the URI that a user gave.
        where: the place where it was given, as errors name it.

    Raises:
        InputError: naming the ways to give a password.
    """
    if uri is None or uri == without_password(uri):
        return
    raise InputError(
        f"{where}: the tracking URI holds a password, a token or a query (what follows a ?), which others may read "
        f"there: write {without_password(uri)}, and give the user and the password of an MLflow server by "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or by ~/.mlflow/credentials, and the complete URI of "
        "a database by MLFLOW_TRACKING_URI"
    )
