"""Tracking URIs are shown without their passwords, and errors of MLflow become one line."""

from pathlib import Path

import pytest

from tuner.errors import InputError
from tuner.tracking.uri import MAX_REASON, check_uri, default_uri, reason, without_password

POSTGRES = "postgresql://me:secret@host/x"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        (POSTGRES, "postgresql://me:***@host/x"),
        ("mssql+pyodbc://host/x?odbc_connect=PWD%3Dsecret", "mssql+pyodbc://host/x?***"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert "secret" not in without_password(uri)
    assert without_password(uri) == shown


def test_without_a_variable_the_store_is_sqlite_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(Path("/a/night")) == "sqlite:////a/night/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", POSTGRES)
    assert default_uri(Path("/a/night")) == POSTGRES


@pytest.mark.parametrize("uri", ["sqlite:////tmp/x.db", "http://host", "mysql+pymysql://host/x", POSTGRES])
def test_a_uri_of_a_known_store_is_accepted(uri: str) -> None:
    check_uri(uri)


def test_another_uri_is_refused_with_the_known_schemes() -> None:
    with pytest.raises(
        InputError, match=r"nonsense://me:\*\*\*@host cannot be used: .*databricks, http, https"
    ):
        check_uri("nonsense://me:secret@host")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "ValueError"),
        ("first line.\nsecond line", "first line"),
        ("(raised as a result of Query-invoked autoflush)\ndisk full", "disk full"),
        (f"{POSTGRES}: no such host", "postgresql://me:***@host/x: no such host"),
        (
            "HTTPPool: too many retries (Caused by NewConnectionError(\"HTTPConnection(host='x'): refused\"))",
            "refused",
        ),
        ("x" * 2 * MAX_REASON, "x" * MAX_REASON),
    ],
)
def test_an_error_becomes_one_line_without_a_password(text: str, line: str) -> None:
    assert reason(ValueError(text), POSTGRES) == line
