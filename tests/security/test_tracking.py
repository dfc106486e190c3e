"""What a results folder from somebody else can have MLflow do, and what a password shows: nothing."""

import os
import shutil
import socket
import sqlite3
import stat
import struct
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from launchers.tracking import Tracker
from tests.replay import claim, sweep_of
from tests.trials import completed_row, write_trial
from tests.unit.cli.commands import SWEEP, refused, write
from tuner.cli.app import run
from tuner.errors import InputError
from tuner.files import read_json_data, write_json
from tuner.sweep.configuration import Tracking
from tuner.sweep.folder import SweepFolder
from tuner.tracking.connection import connect, open_runs
from tuner.tracking.own_store import own_store

TOKEN = "token-of-this-user"
PASSWORD = "hunter2secret"
COMMANDS = ("sync", "ui")


@pytest.fixture(autouse=True)
def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user works in an empty folder, has a token for MLflow, and starts no server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("MLflow's server was started"))


@pytest.fixture
def foreign(results: Path) -> Path:
    """A results folder with one trial, which the tests change as an attacker would."""
    claim(SweepFolder(results), sweep_of(tracking={"experiment": "night shift"}))
    write_trial(results, completed_row(0, 100.0))
    return results


def _name_uri(results: Path, uri: str) -> None:
    """Have the folder's sweep.json name a tracking URI, as somebody else may write it."""
    identity = SweepFolder(results).identity
    data = read_json_data(identity)
    data["tracking"]["uri"] = uri
    write_json(identity, data)


@dataclass
class _Server:
    """Answers every request with an error that quotes the request, and keeps the requests."""

    listener: socket.socket
    requests: list[bytes] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    request = connection.recv(65536)
                    self.requests.append(request)
                    head = (
                        f"HTTP/1.1 500 Error\r\nConnection: close\r\nContent-Length: {len(request)}\r\n\r\n"
                    )
                    connection.sendall(head.encode() + request)


@pytest.fixture
def server() -> Iterator[_Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = _Server(listener)
        thread = threading.Thread(target=started.serve)
        thread.start()
        yield started
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stranger_cannot_name_the_server_that_gets_my_token(
    foreign: Path, server: _Server, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _name_uri(foreign, f"http://{server.place}")
    message = refused(capsys, command, str(foreign))
    assert f"sweep.json: names the MLflow at http://{server.place}" in message
    assert f"--uri http://{server.place}" in message
    assert server.requests == []


def test_a_server_that_i_name_gets_my_token(
    foreign: Path, server: _Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://{server.place}"
    _name_uri(foreign, uri)
    refused(capsys, "sync", str(foreign), "--uri", uri)
    assert TOKEN.encode() in server.requests.pop()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refused(capsys, "sync", str(foreign))
    assert TOKEN.encode() in server.requests.pop()


def test_a_stranger_cannot_send_my_trials_elsewhere_when_i_name_a_server(
    foreign: Path, server: _Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine.example")
    _name_uri(foreign, f"http://{server.place}")
    assert "MLFLOW_TRACKING_URI names another one" in refused(capsys, "sync", str(foreign))
    assert server.requests == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stranger_cannot_have_mlflow_write_into_my_database(
    foreign: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "mine.db"
    with closing(sqlite3.connect(database)) as mine:
        mine.execute("create table precious (x)")
        mine.commit()
    before = database.read_bytes()
    for uri in (
        f"sqlite:///{database}",
        f"sqlite:///{foreign}/../{foreign.name}/mlflow.db/../../x/mlflow.db",
    ):
        _name_uri(foreign, uri)
        assert "names the MLflow at sqlite:///" in refused(capsys, command, str(foreign))
    (foreign / "mlflow.db").symlink_to(database)
    _name_uri(foreign, own_store(foreign))
    assert "is a link that leads out of the results" in refused(capsys, command, str(foreign))
    assert database.read_bytes() == before


def test_the_store_in_the_folder_is_used_without_asking(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    _name_uri(foreign, own_store(foreign))
    assert run(["sync", str(foreign)]) == 0
    assert (foreign / "mlflow.db").exists()
    assert (foreign / "mlartifacts").exists()


@pytest.fixture(scope="module")
def tables(in_memory: Path) -> Path:
    """A store without runs. The tests copy it, since making the tables takes seconds."""
    path = in_memory / "tables.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def synced(foreign: Path, tables: Path) -> Path:
    """The folder with a store of its own, which holds the trial."""
    shutil.copy(tables, foreign / "mlflow.db")
    assert run(["sync", str(foreign)]) == 0
    return foreign


def _change_store(results: Path, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(results / "mlflow.db")) as store:
        store.execute(statement, values)
        store.commit()


def _files_beside(results: Path) -> set[Path]:
    return {path for path in results.parent.rglob("*") if not path.is_relative_to(results)}


@pytest.mark.parametrize(
    "place",
    [
        "{outside}",
        "file://{outside}",
        "file://{results}/mlartifacts/../../outside",
        "{results}/mlartifacts/%2e%2e/%2e%2e/outside",
        "file://host{results}/mlartifacts",
        "mlartifacts",
        "s3://bucket/x",
        "file://{results}/mlartifacts?x",
    ],
)
@pytest.mark.parametrize(
    "statement", ["update experiments set artifact_location = ?", "update runs set artifact_uri = ?"]
)
def test_a_stranger_cannot_have_files_written_outside_the_folder(
    synced: Path, place: str, statement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trial(synced, completed_row(1, 90.0))
    _change_store(synced, statement, place.format(outside=synced.parent / "outside", results=synced))
    files, store = _files_beside(synced), (synced / "mlflow.db").read_bytes()
    for command in COMMANDS:
        message = refused(capsys, command, str(synced))
        assert "mlflow.db: keeps files at" in message
        assert "Delete mlflow.db and mlartifacts there" in message
    assert (_files_beside(synced), (synced / "mlflow.db").read_bytes()) == (files, store)


def test_a_stranger_cannot_have_a_trigger_of_the_store_move_files_outside(
    synced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trial(synced, completed_row(1, 90.0))
    outside = synced.parent / "outside"
    _change_store(
        synced,
        "create trigger away after insert on tags begin "
        f"update runs set artifact_uri = '{outside}' where run_uuid = new.run_uuid; end",
    )
    files = _files_beside(synced)
    run(["sync", str(synced)])
    capsys.readouterr()
    assert "outside the results folder" in refused(capsys, "sync", str(synced))
    assert _files_beside(synced) == files


def test_a_folder_that_was_moved_gets_a_new_store_as_the_error_says(
    synced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = synced.rename(synced.with_name("moved"))
    assert "or the folder was moved" in refused(capsys, "sync", str(moved))
    (moved / "mlflow.db").unlink()
    assert run(["sync", str(moved)]) == 0


@pytest.mark.parametrize("store", ["mlflow.db", "study.db"])
def test_a_stranger_cannot_have_sqlite_delete_my_file(
    foreign: Path, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "precious"
    victim.write_text("mine")
    with closing(sqlite3.connect(foreign / store)) as database:
        database.execute("create table t (x)")
        database.commit()
    (foreign / f"{store}-journal").write_bytes(_journal(foreign / store, victim))
    if store == "mlflow.db":
        for command in COMMANDS:
            assert "mlflow.db-journal: names another file" in refused(capsys, command, str(foreign))
    with pytest.raises(InputError, match="names another file, which SQLite would delete"):
        claim(SweepFolder(foreign), sweep_of())
    assert victim.exists()


def _journal(database: Path, victim: Path) -> bytes:
    """A journal after which SQLite deletes `victim` when it opens the database."""
    magic, name = bytes.fromhex("d9d505f920a163d7"), bytes(victim)
    head = magic + struct.pack(">IIIII", 0, 1, database.stat().st_size // 4096, 512, 4096)
    lock_page = struct.pack(">I", 0x40000000 // 4096 + 1)
    return head.ljust(512, b"\0") + lock_page + name + struct.pack(">II", len(name), sum(name)) + magic


def test_the_journal_of_the_test_does_delete_a_file(tmp_path: Path) -> None:
    victim = tmp_path / "precious"
    victim.write_text("mine")
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        database.execute("create table t (x)")
        database.commit()
    (tmp_path / "x.db-journal").write_bytes(_journal(tmp_path / "x.db", victim))
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        database.execute("select * from t")
    assert not victim.exists()


SECRET_URIS = (
    f"postgresql://me:{PASSWORD}@127.0.0.1:1/x",
    f"postgresql://me:p/#?{PASSWORD}@127.0.0.1:1/x",
    f"postgresql://127.0.0.1:1/x?user=me&password={PASSWORD}",
    f"mssql+pyodbc://127.0.0.1:1/x?odbc_connect=PWD%3D{PASSWORD}",
    f"http://me:{PASSWORD}@127.0.0.1:1",
    f"http://{PASSWORD}@127.0.0.1:1",
    f"http://127.0.0.1:1/?token={PASSWORD}",
)


@pytest.mark.parametrize("uri", SECRET_URIS)
def test_a_reader_of_files_and_arguments_cannot_find_the_password_of_a_sweep_file_or_an_option(
    foreign: Path, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "sweep.yaml", {**SWEEP, "tracking": {"uri": uri}})
    for arguments in (
        ("plan", path),
        ("sweep", path),
        ("sync", str(foreign), "--uri", uri),
        ("ui", str(foreign), "--uri", uri),
    ):
        message = refused(capsys, *arguments)
        assert "the tracking URI holds a password" in message
        assert "MLFLOW_TRACKING_PASSWORD or by ~/.mlflow/credentials" in message
        assert PASSWORD not in message
    assert not Path("results").exists()


@pytest.mark.parametrize("uri", SECRET_URIS)
def test_a_reader_of_an_older_folder_is_not_shown_its_password(
    foreign: Path, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _name_uri(foreign, uri)
    for arguments in (("sync", str(foreign)), ("ui", str(foreign))):
        message = refused(capsys, *arguments)
        assert "MLFLOW_TRACKING_URI is not set" in message
        assert PASSWORD not in message
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    message = refused(capsys, "sync", str(foreign))
    assert "0 of 1 trials" in message
    assert PASSWORD not in message


def _secret_store(results: Path) -> str:
    """The URI of a SQLite file that has a password, which SQLite does not ask for."""
    return f"sqlite:///file:{results.parent / 'private.db'}?mode=rwc&uri=true&password={PASSWORD}"


def test_a_password_in_the_environment_is_used_and_shows_nowhere(
    foreign: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _secret_store(foreign))
    assert run(["sync", str(foreign)]) == 0
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, variables: started.append((words, variables)))
    assert run(["ui", str(foreign)]) == 0
    out, err = capsys.readouterr()
    assert PASSWORD not in out + err
    ((words, variables),) = started
    assert PASSWORD not in " ".join(words)
    assert PASSWORD in variables["MLFLOW_BACKEND_STORE_URI"]
    _assert_absent(foreign)


def _assert_absent(results: Path) -> None:
    assert [
        path for path in results.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()
    ] == []


def test_a_password_in_the_environment_completes_the_uri_that_the_folder_names(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _secret_store(foreign)
    _name_uri(foreign, store.partition("?")[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert run(["sync", str(foreign)]) == 0
    assert (foreign.parent / "private.db").exists()


def test_the_answer_of_a_server_cannot_bring_the_password_into_the_log(
    foreign: Path,
    server: _Server,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = b64encode(f"me:{PASSWORD}".encode()).decode()
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@{server.place}")
    message = refused(capsys, "sync", str(foreign))
    assert encoded.encode() in server.requests.pop()
    assert encoded not in message
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
    tracker = Tracker.open(foreign, None)
    tracker.finish("", "FINISHED")
    assert PASSWORD.encode() in server.requests.pop()
    assert "500" in (foreign / "mlflow.log").read_text()
    assert PASSWORD not in caplog.text
    _assert_absent(foreign)


def test_another_user_of_the_machine_cannot_look_into_new_results(results: Path) -> None:
    claim(SweepFolder(results), sweep_of())
    assert stat.S_IMODE(results.stat().st_mode) == 0o700
    results.chmod(0o755)
    claim(SweepFolder(results), sweep_of())
    assert stat.S_IMODE(results.stat().st_mode) == 0o755, "a user who opened the folder keeps it open"


def test_a_sweep_built_in_python_cannot_bring_a_password_into_the_folder(results: Path) -> None:
    sweep = replace(sweep_of(), tracking=Tracking(uri=SECRET_URIS[0]))
    with pytest.raises(InputError, match="holds a password"):
        claim(SweepFolder(results), sweep)
    assert not results.exists()


def test_a_stranger_cannot_have_a_resumed_sweep_write_outside_the_folder(synced: Path) -> None:
    _change_store(synced, "update experiments set artifact_location = ?", str(synced.parent / "outside"))
    with pytest.raises(InputError, match="outside the results folder"):
        open_runs(SweepFolder(synced), own_store(synced))
