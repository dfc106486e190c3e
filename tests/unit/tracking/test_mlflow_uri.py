"""A tracking URI is shown without its password, and errors of MLflow become one line."""

from pathlib import Path

import pytest

from tuner.errors import InputError
from tuner.sweep.tracking_uri import refuse_password, without_password
from tuner.tracking.own_store import is_own_store, own_store
from tuner.tracking.uri import MAX_REASON, check_uri, chosen_uri, reason, without_secrets

POSTGRES = "postgresql://me:secret@host/x"
NIGHT = Path("/a/night")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (POSTGRES, "postgresql://me@host/x"),
        ("postgresql+psycopg://me:p@/?#:secret@host/x", "postgresql+psycopg://me@host/x"),
        ("mssql+pyodbc://host/x?odbc_connect=PWD%3Dsecret", "mssql+pyodbc://host/x"),
        ("postgresql://host/x?password=secret", "postgresql://host/x"),
        ("https://me:secret@host:5000/a", "https://host:5000/a"),
        ("https://secret@host", "https://host"),
        ("https://host/a?token=secret", "https://host/a"),
        ("https://host/a#token=secret", "https://host/a"),
        ("me:secret@host/x", "me:host/x"),
    ],
)
def test_a_uri_is_shown_without_its_password_and_cannot_be_kept_with_it(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
    with pytest.raises(InputError, match="holds a password, a token or a query") as caught:
        refuse_password(uri, "--uri")
    assert "secret" not in str(caught.value)
    assert "secret" not in without_secrets(f"nobody answers at {uri}", uri)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://host/a@b",
        "sqlite:////home/me@site/a:b#c/x.db",
        "sqlite:///x.db",
        "postgresql://me@host:5432/x",
        "databricks://profile",
        "databricks",
    ],
)
def test_a_uri_without_a_password_is_shown_and_kept_as_it_is(uri: str) -> None:
    assert without_password(uri) == uri
    refuse_password(uri, "--uri")


def test_without_a_variable_the_store_is_sqlite_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert chosen_uri(NIGHT, None) == "sqlite:////a/night/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", POSTGRES)
    assert chosen_uri(NIGHT, None) == POSTGRES


def test_the_variable_completes_the_uri_that_a_sweep_file_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", POSTGRES)
    assert chosen_uri(NIGHT, "postgresql://me@host/x") == POSTGRES
    assert chosen_uri(NIGHT, "postgresql://me@host/y") == "postgresql://me@host/y"
    assert chosen_uri(NIGHT, "postgresql://you@host/x") == "postgresql://you@host/x"


@pytest.mark.parametrize(
    ("uri", "is_own"),
    [
        (own_store(NIGHT), True),
        ("sqlite+pysqlite:////a/x/../night/mlflow.db", True),
        ("sqlite:////a/night/mlflow.db?timeout=1", True),
        ("sqlite:////a/night/other.db", False),
        ("sqlite:////a/mlflow.db", False),
        ("postgresql:////a/night/mlflow.db", False),
        ("http://a/night/mlflow.db", False),
    ],
)
def test_the_folders_own_store_is_the_one_in_it(uri: str, is_own: bool) -> None:
    assert is_own_store(NIGHT, uri) == is_own


@pytest.mark.parametrize("uri", ["sqlite:////tmp/x.db", "http://host", "mysql+pymysql://host/x", POSTGRES])
def test_a_uri_of_a_known_store_is_accepted(uri: str) -> None:
    check_uri(uri)


def test_another_uri_is_refused_with_the_known_schemes() -> None:
    with pytest.raises(InputError, match=r"nonsense://host cannot be used: .*databricks, http, https"):
        check_uri("nonsense://me:secret@host")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "ValueError"),
        ("first line.\nsecond line", "first line"),
        ("(raised as a result of Query-invoked autoflush)\ndisk full", "disk full"),
        (f"{POSTGRES}: no such host", "postgresql://me@host/x: no such host"),
        ("password 'secret' of me", "password '***' of me"),
        ("\x1b[2J", "\\x1b[2J"),
        (
            "HTTPPool: too many retries (Caused by NewConnectionError(\"HTTPConnection(host='x'): refused\"))",
            "refused",
        ),
        ("x" * 2 * MAX_REASON, "x" * MAX_REASON),
    ],
)
def test_an_error_becomes_one_line_without_a_password(text: str, line: str) -> None:
    assert reason(ValueError(text), POSTGRES) == line


def test_an_error_that_follows_from_a_lack_of_memory_says_so() -> None:
    error = RuntimeError("request failed")
    error.__cause__ = MemoryError()
    assert "GiB of memory" in reason(error, POSTGRES)
