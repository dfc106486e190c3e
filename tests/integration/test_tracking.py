"""MLflow is a faithful view of the trial folders: it holds each trial once, whatever fails, and delays no sweep."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from launchers import tracking as tracking
from launchers.tracking import Tracker
from tests.replay import claim, snapshot_of, sweep_of
from tests.trials import completed_row, failed_row, spec_of, write_trial
from tuner.cli.app import run as megatune
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.sweep.folder import SweepFolder
from tuner.tracking import memory
from tuner.tracking.connection import MLFLOW_ENVIRONMENT, connect, open_runs
from tuner.tracking.logs import LOG_TAIL_BYTES
from tuner.tracking.names import BEST_METRICS, PARAMETERS, RECORD, RUN_TAGS, SWEEP_TAGS, TRIAL_TAGS
from tuner.tracking.runs import MlflowRuns
from tuner.tracking.spool import Entry, Spool, SweepClosing, note_end, note_start
from tuner.tracking.uri import chosen_uri
from tuner.tracking.values import config_hash, trial_metrics
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial

NIGHT = [
    completed_row(0, 100.0, layout=Layout(tp=8), source="baseline"),
    failed_row(1, source="seed"),
    completed_row(2, 80.0, layout=Layout(tp=2), source="seed", note="guide says tp=4: moved"),
    failed_row(3, Outcome.INTERRUPTED, "stopped by the user"),
    completed_row(4, 90.0, layout=Layout(tp=4), source="final"),
]
NUMBERS = [trial.number for trial in NIGHT]
ENDED = SweepClosing(
    status="FINISHED", ended_ms=1_772_330_000_000, summary="# night\n" + "a finding\n" * 1000
)
ROOT = Path(__file__).parents[2]
AT_ONCE_S = 2.0
"""The longest that a call may take which waits for nobody. It takes microseconds on a quiet machine, longer on a busy
one; a call that waited for MLflow would take up to 10 s.
"""


@pytest.fixture(autouse=True)
def _no_ambient_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def folder(in_memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=in_memory))


@dataclass(frozen=True)
class _First:
    """The files and the output of a `megatune sync` that made its own SQLite store."""

    results: Path
    written_elsewhere: list[Path]
    out: str
    err: str

    @property
    def store(self) -> Path:
        return self.results / "mlflow.db"


@pytest.fixture(scope="module")
def first(in_memory: Path) -> _First:
    """The first sync of a sweep. The other tests copy its store, since making the tables takes seconds."""
    results, elsewhere = in_memory / "first", in_memory / "elsewhere"
    elsewhere.mkdir()
    _night(results, NIGHT[:1], experiment="first")
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-c", "from tuner.cli import main; main()", "sync", str(results)],
        cwd=elsewhere,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return _First(results, list(elsewhere.iterdir()), done.stdout, done.stderr)


@pytest.fixture
def database(first: _First, folder: Path) -> str:
    """A store for one test."""
    return f"sqlite:///{shutil.copy(first.store, folder / 'store.db')}"


@pytest.fixture(scope="module")
def shared(first: _First, in_memory: Path) -> str:
    """A store for all tests that do not mind the sweeps of others in it."""
    return f"sqlite:///{shutil.copy(first.store, in_memory / 'shared.db')}"


def _night(path: Path, trials: list[FinishedTrial] = NIGHT, experiment: str = "night shift") -> Path:
    """Write a sweep's folder with these trials, and return its path."""
    claim(SweepFolder(path), sweep_of(tracking={"experiment": experiment}))
    for trial in trials:
        write_trial(path, trial)
    return path


@pytest.fixture
def results(folder: Path) -> Path:
    return _night(folder / "night")


def _open(results: Path, uri: str) -> MlflowRuns:
    return open_runs(SweepFolder(results), uri)


def _log(results: Path, uri: str) -> MlflowRuns:
    """Log what MLflow lacks, as the tuner and `megatune sync` do."""
    runs = _open(results, uri)
    runs.catch_up(Spool(results), lambda entry: None)
    return runs


def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def _trials(results: Path, uri: str) -> dict[int, Run]:
    """The MLflow runs of the trials by number; fails if a trial or the sweep has two."""
    client = _client(uri)
    identity = (results / "sweep_id").read_text().strip()
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.`megatune.sweep_id` = '{identity}'"
    runs = client.search_runs(ids, query, max_results=1000)
    trials = [run for run in runs if run.data.tags["megatune.kind"] == "trial"]
    numbers = [int(run.data.tags["megatune.trial"]) for run in trials]
    assert len(numbers) == len(set(numbers)), "a trial has two runs"
    assert len(runs) - len(trials) <= 1, "the sweep has two runs"
    return dict(zip(numbers, trials, strict=True))


def _assert_every_trial_is_there_once(results: Path, uri: str, trials: list[FinishedTrial] = NIGHT) -> None:
    runs, client = _trials(results, uri), _client(uri)
    assert sorted(runs) == [trial.number for trial in trials]
    for trial in trials:
        run = runs[trial.number]
        assert RECORD in run.data.tags
        assert run.info.status != "RUNNING"
        expected = trial_metrics(trial.result)
        for name in {point.name for point in expected}:
            points = [(p.value, p.step) for p in client.get_metric_history(run.info.run_id, name)]
            assert points == [(point.value, point.step) for point in expected if point.name == name]
        paths = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert paths == {"spec.json", "source.json", "plan.json", "result.json", "log"}
        parent = run.data.tags["mlflow.parentRunId"]
    steps = [p.step for p in client.get_metric_history(parent, "best/step_time_ms")]
    assert steps == [trial.number for trial in trials if trial.result.metrics]


@pytest.fixture(scope="module")
def logged(in_memory: Path, shared: str) -> Path:
    """A night that the shared store holds; tests only read it."""
    path = _night(in_memory / "logged")
    _log(path, shared)
    return path


def test_a_sweep_is_one_run_with_one_nested_run_a_trial(logged: Path, shared: str) -> None:
    parent = _client(shared).get_run(_open(logged, shared).run_id)
    assert parent.info.run_name == "night"
    assert parent.info.status == "RUNNING"
    _assert_every_trial_is_there_once(logged, shared)
    runs = _trials(logged, shared)
    assert [runs[number].info.status for number in range(5)] == [
        "FINISHED",
        "FAILED",
        "FINISHED",
        "KILLED",
        "FINISHED",
    ]
    assert runs[2].info.run_name == "t0002 tp2 pp1 mbs1"
    assert runs[2].info.end_time - runs[2].info.start_time == 15_000


def test_every_trial_has_every_parameter_under_megatrons_name(logged: Path, shared: str) -> None:
    names = {fact.name for fact in PARAMETERS}
    assert len(names) == len(PARAMETERS) > len(fields(Layout))
    runs = _trials(logged, shared)
    for run in runs.values():
        assert set(run.data.params) == names
    params = runs[2].data.params
    assert params["tensor_model_parallel_size"] == "2"
    assert params["data_parallel_size"] == "4"
    assert params["num_microbatches"] == "4"
    assert params["use_distributed_optimizer"] == "True"
    assert (params["model"], params["world_size"], params["global_batch_size"]) == ("test-gpt", "8", "16")


def test_a_completed_trial_has_every_metric_and_its_steps_as_a_series(logged: Path, shared: str) -> None:
    run = _trials(logged, shared)[2]
    assert set(run.data.metrics) == {point.name for point in trial_metrics(NIGHT[2].result)}
    assert run.data.metrics["step/time_median_ms"] == 80.0
    assert run.data.metrics["throughput/tokens_per_s_per_gpu"] == 3200.0
    assert run.data.metrics["throughput/mfu"] == 0.5
    assert run.data.metrics["memory/peak_reserved_gib"] == 11.5
    assert run.data.metrics["duration/total_s"] == 15.0
    series = _client(shared).get_metric_history(run.info.run_id, "step/time_ms")
    assert [(point.step, point.value) for point in series] == [(0, 78.0), (1, 80.0), (2, 82.0)]


def test_a_failed_trial_has_its_cause_as_tags_and_no_made_up_metric(logged: Path, shared: str) -> None:
    run = _trials(logged, shared)[1]
    assert {name.split("/")[0] for name in run.data.metrics} == {"duration"}
    tags = run.data.tags
    assert tags["megatune.outcome"] == "oom"
    assert tags["megatune.reason"] == "rank 3 ran out of memory"
    assert (tags["megatune.phase"], tags["megatune.rank"], tags["megatune.source"]) == ("warmup", "3", "seed")


def test_the_searches_of_the_document_find_what_they_say(logged: Path, shared: str) -> None:
    document = (ROOT / "docs" / "mlflow.md").read_text(encoding="utf-8")
    searches = document.split("```sql\n")[1].split("```")[0].splitlines()
    runs = _open(logged, shared)
    answers = [
        sorted(
            run.data.tags.get("megatune.trial", "sweep")
            for run in _client(shared).search_runs([runs.experiment_id], search, max_results=1000)
            if runs.run_id in (run.info.run_id, run.data.tags.get("mlflow.parentRunId"))
        )
        for search in searches
    ]
    assert answers == [["0", "1", "2", "3", "4"], ["1"], ["2"], ["4"], ["2"], ["sweep"]]


def test_every_tag_is_a_documented_one(results: Path, shared: str) -> None:
    note_end(results, ENDED)
    runs = _log(results, shared)

    def undocumented(run: Run, documented: set[str]) -> set[str]:
        # MLflow sets tags of its own, which megatune need not document.
        tags = {name for name in run.data.tags if name not in documented and not name.startswith("mlflow.")}
        return {name for name in tags if not name.startswith("megatune.versions.")}

    trials = _trials(results, shared)
    for run in trials.values():
        assert undocumented(run, {*RUN_TAGS, *TRIAL_TAGS}) == set()
    tags = trials[2].data.tags
    assert tags["megatune.versions.torch"] == "2.13.0"
    assert tags["megatune.source_note"] == "guide says tp=4: moved"
    assert tags["megatune.config_hash"] == config_hash(spec_of(2, Layout(tp=2)))
    assert undocumented(_client(shared).get_run(runs.run_id), {*RUN_TAGS, *SWEEP_TAGS}) == set()


def test_the_commit_of_the_working_directory_is_on_every_run(
    results: Path, shared: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run([*git, *command], cwd=work, check=True, capture_output=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=work, check=True, capture_output=True, text=True
    ).stdout
    monkeypatch.chdir(work)
    logged = _log(results, shared)
    runs = [_client(shared).get_run(logged.run_id), _trials(results, shared)[0]]
    assert [run.data.tags["mlflow.source.git.commit"] for run in runs] == [head.strip()] * 2


def test_the_sweeps_run_holds_the_best_so_far_by_trial(results: Path, database: str) -> None:
    _log(results, database)
    runs, client = _log(results, database), _client(database)
    for measure in BEST_METRICS:
        assert [p.step for p in client.get_metric_history(runs.run_id, measure.name)] == [0, 2, 4]
    history = client.get_metric_history(runs.run_id, "best/step_time_ms")
    assert [point.value for point in history] == [100.0, 80.0, 80.0]
    assert client.get_run(runs.run_id).data.tags["megatune.best_trial"] == "2"


def test_logging_twice_changes_nothing(results: Path, database: str) -> None:
    note_end(results, ENDED)
    first = _log(results, database)
    before = {number: run.to_dictionary() for number, run in _trials(results, database).items()}
    parent = _client(database).get_run(first.run_id).to_dictionary()
    first.catch_up(Spool(results), lambda entry: None)
    assert _log(results, database).run_id == first.run_id
    assert {number: run.to_dictionary() for number, run in _trials(results, database).items()} == before
    assert _client(database).get_run(first.run_id).to_dictionary() == parent


def test_the_end_of_a_sweep_is_on_its_run_until_it_goes_on(
    results: Path, shared: str, tmp_path: Path
) -> None:
    note_end(results, ENDED)
    client, run_id = _client(shared), _log(results, shared).run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", ENDED.ended_ms)
    note = run.data.tags["mlflow.note.content"]
    assert len(note) < len(ENDED.summary)
    assert ENDED.summary.startswith(note.removesuffix(" ..."))
    path = Path(client.download_artifacts(run_id, "summary.md", str(tmp_path)))
    assert path.read_text() == ENDED.summary
    note_start(results)
    assert _log(results, shared).run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"


def test_two_sweeps_of_one_name_stay_apart(results: Path, shared: str, folder: Path) -> None:
    first = _log(results, shared)
    other = _night(folder / "other", NIGHT[:1])
    second = _log(other, shared)
    assert (second.run_id != first.run_id, second.experiment_id) == (True, first.experiment_id)
    assert sorted(_trials(results, shared)) == NUMBERS
    assert sorted(_trials(other, shared)) == [0]


def test_a_trial_that_was_run_again_replaces_its_run(results: Path, shared: str) -> None:
    runs, spool = _open(results, shared), Spool(results)
    runs.catch_up(spool, lambda entry: None)
    write_trial(results, replace(completed_row(3, 70.0), layout=NIGHT[3].layout))
    runs.catch_up(spool, lambda entry: None)
    trials = _trials(results, shared)
    assert sorted(trials) == NUMBERS
    assert trials[3].info.status == "FINISHED"
    assert trials[3].data.metrics["step/time_median_ms"] == 70.0
    assert "megatune.phase" not in trials[3].data.tags
    assert _client(shared).get_run(runs.run_id).data.tags["megatune.best_trial"] == "3"


def test_a_run_that_a_kill_left_half_written_is_replaced_and_a_double_goes(
    results: Path, database: str
) -> None:
    _log(results, database)
    client, trials = _client(database), _trials(results, database)
    half, whole = trials[2], trials[4]
    client.delete_tag(half.info.run_id, RECORD)
    client.update_run(half.info.run_id, status="RUNNING")
    # As if a server had created the run, and its answer had never come.
    tags = {name: text for name, text in whole.data.tags.items() if name != RECORD}
    client.create_run(whole.info.experiment_id, tags=tags)
    _log(results, database)
    _assert_every_trial_is_there_once(results, database)
    assert _trials(results, database)[2].info.run_id != half.info.run_id


def test_the_evidence_lies_beside_the_run(results: Path, shared: str, tmp_path: Path) -> None:
    (results / "trials/t0002/log/0").mkdir()
    (results / "trials/t0002/log/0/stdout.log").write_bytes(b"start" + b"x" * LOG_TAIL_BYTES + b"end")
    _log(results, shared)
    run_id = _trials(results, shared)[2].info.run_id
    got = Path(_client(shared).download_artifacts(run_id, "", str(tmp_path)))
    for name in ("spec.json", "source.json", "plan.json", "result.json", "log/stderr.log"):
        assert (got / name).read_bytes() == (results / "trials/t0002" / name).read_bytes()
    tail = (got / "log/0/stdout.log").read_bytes()
    assert len(tail) == LOG_TAIL_BYTES
    assert tail.endswith(b"xend")


def test_a_password_that_an_older_folder_holds_is_not_logged(
    results: Path, shared: str, tmp_path: Path
) -> None:
    identity = SweepFolder(results).identity
    data = json.loads(identity.read_text())
    data["tracking"]["uri"] = "postgresql://me:secret@host/x"
    identity.write_text(json.dumps(data))
    runs = _log(results, shared)
    path = Path(_client(shared).download_artifacts(runs.run_id, "sweep.json", str(tmp_path)))
    assert json.loads(path.read_text())["tracking"]["uri"] == "postgresql://me@host/x"


def test_without_a_uri_the_view_lies_in_the_results(first: _First) -> None:
    uri = f"sqlite:///{first.store}"
    # By default MLflow would write files into the working directory and print a hundred lines about its migrations.
    assert (first.out, first.written_elsewhere) == ("", [])
    assert first.err == f"all 1 trials of {first.results} are in MLflow at {uri}\n"
    trials = _trials(first.results, uri)
    assert sorted(trials) == [0]
    assert trials[0].info.artifact_uri.startswith(f"file://{first.results}/mlartifacts/")


def test_the_variable_names_the_server_unless_the_sweep_or_the_command_does(
    results: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert chosen_uri(results, None) == database
    assert megatune(["sync", str(results)]) == 0
    _assert_every_trial_is_there_once(results, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{_free_port()}")
    assert megatune(["sync", str(results)]) == 2
    assert megatune(["sync", str(results), "--uri", database]) == 0


def test_mlflow_reports_nothing_and_gives_up_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in MLFLOW_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    connect(f"http://127.0.0.1:{_free_port()}")
    settings = {name: os.environ[name] for name in MLFLOW_ENVIRONMENT}
    assert settings == {**MLFLOW_ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}


@pytest.mark.parametrize("uri", ["{folder}/mlruns", "file:{folder}/mlruns", "nonsense://me:secret@host"])
def test_a_uri_that_no_store_takes_is_refused_at_once(results: Path, uri: str) -> None:
    uri = uri.format(folder=results)
    begun_s = time.monotonic()
    with pytest.raises(InputError) as caught:
        Tracker.open(results, uri)
    assert time.monotonic() - begun_s < AT_ONCE_S
    assert uri.replace("me:secret@", "") in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)


def test_a_deleted_experiment_is_named(folder: Path, shared: str, capfd: pytest.CaptureFixture[str]) -> None:
    client = _client(shared)
    client.delete_experiment(client.create_experiment("gone"))
    results = _night(folder / "night", experiment="gone")
    assert megatune(["sync", str(results), "--uri", shared]) == 2
    message = capfd.readouterr().err
    assert "experiment 'gone' is deleted" in message
    assert "mlflow experiments restore" in message


def test_a_torn_folder_is_named_and_keeps_no_other_trial_back(
    results: Path, shared: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (results / "trials/t0000/spec.json").write_text("{")
    assert megatune(["sync", str(results), "--uri", shared]) == 2
    assert f"{results}/trials/t0000/spec.json: is not JSON" in capfd.readouterr().err
    assert sorted(_trials(results, shared)) == NUMBERS[1:]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


SERVER = """
import sys
from werkzeug.serving import make_server
from mlflow import server
import os
os.environ[server.BACKEND_STORE_URI_ENV_VAR] = sys.argv[2]
os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = sys.argv[3]
os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
make_server("127.0.0.1", int(sys.argv[1]), server.app, threaded=True).serve_forever()
"""
"""MLflow's server without the workers of `mlflow server`, which take half a minute to start."""


class _Server:
    """A real tracking server in its own process, which a test can start and kill."""

    def __init__(self, folder: Path, database: str) -> None:
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-c", SERVER, str(self.port), database, str(folder / "artifacts")]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._log.parent)
        _wait_until(self._answers, lambda: self._log.read_text()[-2000:])

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def server(folder: Path, database: str) -> Iterator[_Server]:
    server = _Server(folder, database)
    yield server
    server.kill()


def _wait_until(
    condition: Callable[[], bool], describe: Callable[[], str] = str, timeout_s: float = 120
) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, describe()
        time.sleep(0.05)


def _log_trial(tracker: Tracker, results: Path, trial: FinishedTrial) -> None:
    """Log a trial, and check that the tracker returns at once."""
    write_trial(results, trial)
    begun_s = time.monotonic()
    tracker.ended(trial, 0, snapshot_of([trial]))
    assert time.monotonic() - begun_s < AT_ONCE_S


def test_a_server_that_dies_amid_a_sweep_costs_nothing_and_gets_everything_later(
    folder: Path,
    server: _Server,
    database: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    results = _night(folder / "night", NIGHT[:1])
    server.start()
    tracker = Tracker.open(results, server.uri)
    tracker.opened(snapshot_of(NIGHT[:1]), pd.DataFrame())
    _wait_until(lambda: (results / "sweep_id").exists() and 0 in _whole(results, database))
    server.kill()
    for trial in NIGHT[1:]:
        _log_trial(tracker, results, trial)
    begun_s = time.monotonic()
    tracker.finish("the end", "FINISHED")
    assert time.monotonic() - begun_s < tracking.FINISH_S + AT_ONCE_S
    assert caplog.text.count("cannot be used now") == 1
    assert f"4 of 5 trials are not known to be in MLflow at {server.uri}" in caplog.text
    assert f"`megatune sync {results} --uri {server.uri}` logs what is missing" in caplog.text
    assert megatune(["sync", str(results), "--uri", server.uri]) == 2
    assert "0 of 5 trials" in capfd.readouterr().err
    server.start()
    for _ in range(2):
        assert megatune(["sync", str(results), "--uri", server.uri]) == 0
        assert capfd.readouterr().out == ""
        _assert_every_trial_is_there_once(results, server.uri)
    assert [_client(server.uri).get_run(run_id).info.status for run_id in _sweep_runs(results, database)] == [
        "FINISHED"
    ]


def _whole(results: Path, uri: str) -> list[int]:
    return [number for number, run in _trials(results, uri).items() if RECORD in run.data.tags]


def _sweep_runs(results: Path, uri: str) -> set[str]:
    return {run.data.tags["mlflow.parentRunId"] for run in _trials(results, uri).values()}


def test_an_mlflow_that_fails_from_the_start_is_reported_and_gets_everything_once_it_works(
    folder: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    results, client = _night(folder / "night", NIGHT[:2]), _client(database)
    experiment_id = client.create_experiment("night shift", artifact_location=f"file://{folder}/artifacts")
    client.delete_experiment(experiment_id)
    begun_s = time.monotonic()
    tracker = Tracker.open(results, database)
    tracker.opened(snapshot_of(NIGHT[:2]), pd.DataFrame())
    assert time.monotonic() - begun_s < AT_ONCE_S
    _wait_until(lambda: "cannot be used now (experiment 'night shift' is deleted" in caplog.text)
    client.restore_experiment(experiment_id)
    for trial in NIGHT[2:]:
        _log_trial(tracker, results, trial)
    tracker.finish("the end", "FINISHED")
    assert "not known to be in MLflow" not in caplog.text
    assert f"MLflow at {database} answers again" in caplog.text
    _assert_every_trial_is_there_once(results, database)


def test_a_server_that_never_answers_is_not_waited_for(
    results: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        tracker = Tracker.open(results, f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker.opened(snapshot_of(NIGHT[:4]), pd.DataFrame())
        # Go on only once the logging process hangs in a request.
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            for _ in range(5):
                _log_trial(tracker, results, NIGHT[4])
            begun_s = time.monotonic()
            tracker.finish("the end", "KILLED")
            assert time.monotonic() - begun_s < 1 + AT_ONCE_S
    assert "5 of 5 trials are not known to be in MLflow" in caplog.text
    assert "it took longer than 1 s" in caplog.text


def test_a_full_disk_costs_nothing_and_gets_everything_once_there_is_room(
    results: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(results, database)
    tracker.opened(snapshot_of(NIGHT), pd.DataFrame())
    _wait_until(lambda: (results / "sweep_id").exists() and sorted(_whole(results, database)) == NUMBERS)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert tracker.process_id is not None
    resource.prlimit(tracker.process_id, resource.RLIMIT_FSIZE, (4096, most))
    again = replace(completed_row(3, 70.0), layout=NIGHT[3].layout)
    _log_trial(tracker, results, again)
    _wait_until(lambda: "cannot be used now" in caplog.text)
    resource.prlimit(tracker.process_id, resource.RLIMIT_FSIZE, (most, most))
    tracker.finish("the end", "FINISHED")
    assert "not known to be in MLflow" not in caplog.text
    _assert_every_trial_is_there_once(results, database, [*NIGHT[:3], again, NIGHT[4]])


TUNER = """
import sys, time
from pathlib import Path
from launchers.tracking import Tracker
tracker = Tracker.open(Path(sys.argv[1]), sys.argv[2])
while tracker.process_id is None:
    time.sleep(0.01)
print(tracker.process_id, flush=True)
time.sleep(60)
"""


def test_the_logging_process_does_not_outlive_a_killed_tuner(results: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        command = [sys.executable, "-c", TUNER, str(results), f"http://127.0.0.1:{silent.getsockname()[1]}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        tuner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert tuner.stdout is not None
        logger = int(tuner.stdout.readline())
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            assert Path(f"/proc/{logger}").exists()
            tuner.kill()
            tuner.communicate()
            _wait_until(lambda: not _lives(logger), timeout_s=5)


def test_a_logging_process_that_is_killed_is_started_again_and_logs_everything(
    folder: Path, database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "STARTS_AFTER_S", (0.0, 0.1))
    results = _night(folder / "night", NIGHT[:1])
    tracker = Tracker.open(results, database)
    tracker.opened(snapshot_of(NIGHT[:1]), pd.DataFrame())
    _wait_until(lambda: (results / "sweep_id").exists() and 0 in _whole(results, database))
    killed = _kill(tracker)
    for trial in NIGHT[1:]:
        _log_trial(tracker, results, trial)
    _wait_until(lambda: tracker.process_id != killed and sorted(_whole(results, database)) == NUMBERS)
    tracker.finish("the end", "FINISHED")
    assert "its process ended with SIGKILL" in caplog.text
    assert "not known to be in MLflow" not in caplog.text
    _assert_every_trial_is_there_once(results, database)


def test_a_logging_process_that_ends_again_and_again_is_given_up_and_reported(
    results: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "STARTS_AFTER_S", (0.0, 0.0, 0.1))
    tracker = Tracker.open(results, f"http://127.0.0.1:{_free_port()}")
    tracker.opened(snapshot_of(NIGHT), pd.DataFrame())
    killed = set[int]()
    while len(killed) < 3:
        _wait_until(lambda: tracker.process_id not in {None, *killed})
        killed.add(_kill(tracker))
    _wait_until(lambda: "has ended 3 times and is not started again" in caplog.text)
    for trial in NIGHT:
        _log_trial(tracker, results, trial)
    tracker.finish("the end", "FINISHED")
    assert tracker.process_id in killed
    assert "5 of 5 trials are not known to be in MLflow" in caplog.text


def test_the_end_of_a_sweep_does_not_wait_for_the_next_start(
    results: Path, database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "STARTS_AFTER_S", (0.0, 1000.0))
    tracker = Tracker.open(results, database)
    tracker.opened(snapshot_of(NIGHT), pd.DataFrame())
    _wait_until(lambda: tracker.process_id is not None)
    _kill(tracker)
    _wait_until(lambda: "its process ended with SIGKILL" in caplog.text)
    tracker.finish("the end", "FINISHED")
    assert "not known to be in MLflow" not in caplog.text
    _assert_every_trial_is_there_once(results, database)


def _kill(tracker: Tracker) -> int:
    """Kill the logging process, and return its id."""
    process_id = tracker.process_id
    assert process_id is not None
    os.kill(process_id, signal.SIGKILL)
    return process_id


def test_an_answer_without_an_end_takes_a_bounded_part_of_the_memory(
    results: Path, endless: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(results, endless)
    tracker.opened(snapshot_of(NIGHT), pd.DataFrame())
    peak_gib = 0.0

    def has_reported() -> bool:
        nonlocal peak_gib
        if tracker.process_id is not None:
            with suppress(psutil.NoSuchProcess):
                peak_gib = max(peak_gib, psutil.Process(tracker.process_id).memory_info().rss / 2**30)
        return "cannot be used now" in caplog.text

    _wait_until(has_reported, lambda: caplog.text, timeout_s=250)
    tracker.close()
    assert f"it needs more than {memory.GROWTH_GIB:g} GiB of memory" in caplog.text
    assert 0.5 < peak_gib < memory.GROWTH_GIB + 0.3


def test_sync_ends_at_an_answer_without_an_end(
    results: Path, endless: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GROWTH_GIB", 0.25)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    assert megatune(["sync", str(results), "--uri", endless]) == 2
    assert "of memory, as if the server's answer had no end" in capfd.readouterr().err
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


@pytest.fixture
def endless() -> Iterator[str]:
    """The URI of a server whose answers never end."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            while True:
                connection.sendall(chunk)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        server.join()


def _lives(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_at_any_moment_the_next_one_leaves_every_trial_there_once(
    results: Path, database: str
) -> None:
    context = multiprocessing.get_context("fork")
    killed = 0
    for delay_s in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        logger = context.Process(target=_log, args=(results, database))
        logger.start()
        logger.join(delay_s)
        logger.kill()
        logger.join()
        killed += logger.exitcode == -signal.SIGKILL
    assert killed >= 3
    assert megatune(["sync", str(results), "--uri", database]) == 0
    _assert_every_trial_is_there_once(results, database)


def test_two_at_once_leave_every_trial_there_once(results: Path, database: str) -> None:
    context = multiprocessing.get_context("fork")
    loggers = [context.Process(target=_log, args=(results, database)) for _ in range(3)]
    for logger in loggers:
        logger.start()
    for logger in loggers:
        logger.join(60)
    assert [logger.exitcode for logger in loggers] == [0, 0, 0]
    _assert_every_trial_is_there_once(results, database)


def test_a_trial_that_mlflow_refuses_keeps_no_other_back(results: Path, database: str) -> None:
    with sqlite3.connect(database.removeprefix("sqlite:///")) as store:
        store.execute(
            "create trigger picky before insert on tags when new.key = 'megatune.trial' and new.value = '1' "
            "begin select raise(abort, 'not this one'); end"
        )
    logged: list[Entry] = []
    with pytest.raises(InputError, match=r"trial 1: .*not this one"):
        _open(results, database).catch_up(Spool(results), logged.append)
    assert [entry.trial.number for entry in logged] == sorted(_trials(results, database)) == [0, 2, 3, 4]
