"""MLflow is a faithful view of the trial folders: written once, healed after failures, never in the way."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.trials import completed_row, failed_row, spec_of, write_trial
from tuner.errors import InputError
from tuner.layout import Layout
from tuner.mlflow_names import (
    BEST_METRICS,
    METRICS,
    PARAMETERS,
    RECORD,
    RUN_TAGS,
    SWEEP_TAGS,
    TRIAL_TAGS,
    config_hash,
)
from tuner.report import TrialRow
from tuner.tracking import LOG_TAIL_BYTES, LOG_TOTAL_BYTES, Tracker, default_uri, log_tails
from tuner.trial import Outcome

NIGHT = [
    completed_row(0, 100.0, layout=Layout(tp=8), source="baseline"),
    failed_row(1, source="seed"),
    completed_row(2, 80.0, layout=Layout(tp=2), source="seed", note="guide says tp=4: moved"),
    failed_row(3, Outcome.INTERRUPTED, "stopped by the user"),
    completed_row(4, 90.0, layout=Layout(tp=4)),
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for most tests: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def _no_ambient_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for row in NIGHT:
        write_trial(tmp_path / "night", row)
    return tmp_path / "night"


def _open(results: Path, uri: str | None) -> Tracker:
    return Tracker.open(results, uri, "megatune/test-gpt/test-cluster", "night", {"team": "a"})


def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def _trials(tracker: Tracker, uri: str) -> dict[int, Run]:
    runs = _client(uri).search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'", max_results=1000
    )
    numbers = [int(run.data.tags["megatune.trial"]) for run in runs]
    assert len(numbers) == len(set(numbers)), "a trial has two runs"
    return dict(zip(numbers, runs, strict=True))


def test_a_sweep_is_one_run_with_one_nested_run_a_trial(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    parent = _client(database).get_run(tracker.run_id)
    assert parent.info.run_name == "night"
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["team"] == "a"
    runs = _trials(tracker, database)
    assert sorted(runs) == [0, 1, 2, 3, 4]
    assert [runs[number].info.status for number in range(5)] == [
        "FINISHED",
        "FAILED",
        "FINISHED",
        "KILLED",
        "FINISHED",
    ]
    assert runs[2].info.run_name == "t0002 tp2 pp1 mbs1"
    assert runs[2].info.end_time - runs[2].info.start_time == 15_000


def test_every_trial_has_every_parameter_under_megatrons_name(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    names = {fact.name for fact in PARAMETERS}
    assert len(names) == len(PARAMETERS) > len(fields(Layout))
    for run in _trials(tracker, database).values():
        assert set(run.data.params) == names
    params = _trials(tracker, database)[2].data.params
    assert params["tensor_model_parallel_size"] == "2"
    assert params["data_parallel_size"] == "4"
    assert params["num_microbatches"] == "4"
    assert params["use_distributed_optimizer"] == "True"
    assert (params["model"], params["world_size"], params["global_batch_size"]) == ("test-gpt", "8", "16")


def test_a_completed_trial_has_every_metric_and_its_steps_as_a_series(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    run = _trials(tracker, database)[2]
    assert set(run.data.metrics) == {measure.name for measure in METRICS}
    assert run.data.metrics["step/time_median_ms"] == 80.0
    assert run.data.metrics["throughput/tokens_per_s_per_gpu"] == 3200.0
    assert run.data.metrics["throughput/mfu"] == 0.5
    assert run.data.metrics["memory/peak_reserved_gib"] == 11.5
    assert run.data.metrics["duration/total_s"] == 15.0
    series = _client(database).get_metric_history(run.info.run_id, "step/time_ms")
    assert [(point.step, point.value) for point in series] == [(0, 78.0), (1, 80.0), (2, 82.0)]


def test_a_failed_trial_has_its_cause_as_tags_and_no_made_up_metric(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    run = _trials(tracker, database)[1]
    assert {name.split("/")[0] for name in run.data.metrics} == {"duration"}
    tags = run.data.tags
    assert tags["megatune.outcome"] == "oom"
    assert tags["megatune.reason"] == "rank 3 ran out of memory"
    assert (tags["megatune.phase"], tags["megatune.rank"], tags["megatune.source"]) == ("warmup", "3", "seed")
    found = _client(database).search_runs([tracker.experiment_id], "tags.`megatune.outcome` = 'oom'")
    assert run.info.run_id in {other.info.run_id for other in found}


def test_the_searches_of_the_document_find_what_they_say(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    document = (Path(__file__).parents[2] / "docs" / "mlflow.md").read_text(encoding="utf-8")
    searches = document.split("```sql\n")[1].split("```")[0].splitlines()
    found = [
        sorted(
            run.data.tags.get("megatune.trial", "sweep")
            for run in _client(database).search_runs([tracker.experiment_id], search, max_results=1000)
            if tracker.run_id in (run.info.run_id, run.data.tags.get("mlflow.parentRunId"))
        )
        for search in searches
    ]
    assert found == [["0", "1", "2", "3", "4"], ["1"], ["2"], ["2"], ["sweep"]]


def test_every_tag_is_a_documented_one(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    tracker.finish("done", "FINISHED")

    def unknown(run: Run, known: set[str]) -> set[str]:
        # MLflow's own are its own, but for those that we set.
        tags = {name for name in run.data.tags if name not in known and not name.startswith("mlflow.")}
        return {name for name in tags if not name.startswith("megatune.versions.")}

    for run in _trials(tracker, database).values():
        assert unknown(run, {*RUN_TAGS, *TRIAL_TAGS}) == set()
        assert run.data.tags["megatune.kind"] == "trial"
    tags = _trials(tracker, database)[2].data.tags
    assert tags["megatune.versions.torch"] == "2.13.0"
    assert tags["megatune.source_note"] == "guide says tp=4: moved"
    assert tags["megatune.config_hash"] == config_hash(spec_of(2, Layout(tp=2)))
    assert unknown(_client(database).get_run(tracker.run_id), {*RUN_TAGS, *SWEEP_TAGS, "team"}) == set()


def test_the_commit_of_the_working_directory_is_on_every_run(
    results: Path, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
    tracker = _open(results, database)
    tracker.sync(NIGHT[:1])
    runs = [_client(database).get_run(tracker.run_id), _trials(tracker, database)[0]]
    assert [run.data.tags["mlflow.source.git.commit"] for run in runs] == [head.strip()] * 2


def test_the_sweeps_run_holds_the_best_so_far_by_trial(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    tracker.sync(NIGHT)
    client = _client(database)
    for measure in BEST_METRICS:
        assert [p.step for p in client.get_metric_history(tracker.run_id, measure.name)] == [0, 2, 4]
    history = client.get_metric_history(tracker.run_id, "best/step_time_ms")
    assert [point.value for point in history] == [100.0, 80.0, 80.0]
    assert client.get_run(tracker.run_id).data.tags["megatune.best_trial"] == "2"


def test_logging_twice_changes_nothing(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    before = {number: run.to_dictionary() for number, run in _trials(tracker, database).items()}
    tracker.sync(NIGHT)
    again = _open(results, database)
    again.sync(NIGHT)
    assert again.run_id == tracker.run_id
    assert {number: run.to_dictionary() for number, run in _trials(again, database).items()} == before


def test_a_resumed_sweep_reopens_its_run_and_logs_what_is_missing(results: Path, database: str) -> None:
    first = _open(results, database)
    first.sync(NIGHT[:2])
    first.finish("stopped", "KILLED")
    resumed = _open(results, database)
    assert resumed.run_id == first.run_id
    assert _client(database).get_run(resumed.run_id).info.status == "RUNNING"
    resumed.sync(NIGHT)
    assert sorted(_trials(resumed, database)) == [0, 1, 2, 3, 4]


def test_two_sweeps_of_one_name_stay_apart(results: Path, database: str, tmp_path: Path) -> None:
    first = _open(results, database)
    first.sync(NIGHT)
    for row in NIGHT[:1]:
        write_trial(tmp_path / "other", row)
    second = _open(tmp_path / "other", database)
    second.sync(NIGHT[:1])
    assert second.run_id != first.run_id
    assert sorted(_trials(first, database)) == [0, 1, 2, 3, 4]
    assert sorted(_trials(second, database)) == [0]


def test_a_trial_that_was_run_again_replaces_its_run(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    again = replace(completed_row(3, 70.0), layout=NIGHT[3].layout)
    assert tracker.log_trial(again, write_trial(results, again))
    runs = _trials(tracker, database)
    assert sorted(runs) == [0, 1, 2, 3, 4]
    assert runs[3].info.status == "FINISHED"
    assert runs[3].data.metrics["step/time_median_ms"] == 70.0
    assert "megatune.phase" not in runs[3].data.tags
    assert _client(database).get_run(tracker.run_id).data.tags["megatune.best_trial"] == "3"


def test_a_run_that_a_kill_left_half_written_is_replaced(results: Path, database: str) -> None:
    tracker = _open(results, database)
    tracker.sync(NIGHT)
    client, half = _client(database), _trials(tracker, database)[2]
    client.delete_tag(half.info.run_id, RECORD)
    client.update_run(half.info.run_id, status="RUNNING")
    tracker.sync(NIGHT)
    whole = _trials(tracker, database)[2]
    assert whole.info.run_id != half.info.run_id
    assert whole.info.status == "FINISHED"


def test_the_evidence_lies_beside_the_run(results: Path, database: str, tmp_path: Path) -> None:
    tracker = _open(results, database)
    (results / "trials/t0002/log/0").mkdir()
    (results / "trials/t0002/log/0/stdout.log").write_bytes(b"start" + b"x" * LOG_TAIL_BYTES + b"end")
    tracker.sync(NIGHT)
    run_id = _trials(tracker, database)[2].info.run_id
    got = Path(_client(database).download_artifacts(run_id, "", str(tmp_path)))
    for name in ("spec.json", "source.json", "plan.json", "result.json", "log/stderr.log"):
        assert (got / name).read_bytes() == (results / "trials/t0002" / name).read_bytes()
    tail = (got / "log/0/stdout.log").read_bytes()
    assert len(tail) == LOG_TAIL_BYTES
    assert tail.endswith(b"xend")


def test_logs_are_bounded_and_the_failing_rank_comes_first(results: Path) -> None:
    folder = write_trial(results, NIGHT[1])
    for rank in range(30):
        path = folder.log / f"attempt_0/{rank}/stderr.log"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"y" * (LOG_TAIL_BYTES + rank))
    tails = log_tails(folder, rank=29)
    assert next(iter(tails)) == "log/attempt_0/29/stderr.log"
    assert sum(len(tail) for tail in tails.values()) == LOG_TOTAL_BYTES
    assert len(tails) < 30


def test_the_end_of_a_sweep_is_on_its_run(results: Path, database: str, tmp_path: Path) -> None:
    tracker = _open(results, database)
    summary = "# night\n" + "a long line of findings\n" * 1000
    tracker.finish(summary, "FINISHED")
    run = _client(database).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert summary.startswith(run.data.tags["mlflow.note.content"].removesuffix(" ..."))
    path = Path(_client(database).download_artifacts(tracker.run_id, "summary.md", str(tmp_path)))
    assert path.read_text() == summary


LOG_A_NIGHT = """
import sys
from pathlib import Path
from tuner.report import read_trials
from tuner.tracking import Tracker

results = Path(sys.argv[1])
tracker = Tracker.open(results, None, "megatune/test-gpt/test-cluster", "night", {})
tracker.sync(read_trials(results))
"""


def test_without_a_uri_the_view_lies_in_the_results_and_can_be_rebuilt(results: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LOG_A_NIGHT, str(results)]
    for _ in range(2):
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        # MLflow's default would be files in the working directory, and its migrations a hundred lines.
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert list(elsewhere.iterdir()) == []
        (results / "mlflow.db").replace(tmp_path / "taken_away.db")
    client = _client(f"sqlite:///{tmp_path}/taken_away.db")
    experiment = client.get_experiment_by_name("megatune/test-gpt/test-cluster")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`megatune.kind` = 'trial'")
    assert sorted(run.data.tags["megatune.trial"] for run in runs) == ["0", "1", "2", "3", "4"]
    assert all(run.info.artifact_uri.startswith(f"file://{results}/mlartifacts/") for run in runs)


def test_the_variable_names_the_server_unless_the_sweep_does(
    results: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert default_uri(results) == database
    assert _open(results, None).uri == database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert _open(results, database).uri == database


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:{port}",
        "{folder}/mlruns",
        "nonsense://host",
        "postgresql://me:secret@127.0.0.1:{port}/x",
    ],
)
def test_a_wrong_uri_is_refused_at_once(results: Path, tmp_path: Path, uri: str) -> None:
    uri = uri.format(port=_free_port(), folder=tmp_path)
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        _open(results, uri)
    assert time.monotonic() - begun < 60
    assert uri.replace("secret", "***") in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)


class _NotMlflow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NotMlflow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_is_no_mlflow_is_refused(results: Path, other_server: str) -> None:
    with pytest.raises(InputError, match=re.escape(other_server)):
        _open(results, other_server)


def test_a_deleted_experiment_is_named(results: Path, database: str) -> None:
    client = _client(database)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(InputError, match=r"experiment 'gone'.*is deleted.*mlflow experiments restore"):
        Tracker.open(results, database, "gone", "night", {})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A real tracking server, in its own session."""
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "server")]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    uri = f"http://127.0.0.1:{port}"
    try:
        _await_answer(port, process, tmp_path / "server.log")
        yield uri, process
    finally:
        _end(process)


def _await_answer(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the tracking server did not start:\n{log.read_text()[-2000:]}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_server_that_dies_amid_a_sweep_costs_a_warning_and_the_next_sync_heals(
    results: Path,
    server: tuple[str, "subprocess.Popen[bytes]"],
    database: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri, process = server
    tracker = _open(results, uri)
    assert tracker.log_trial(NIGHT[0], write_trial(results, NIGHT[0]))
    run = _trials(tracker, uri)[0]
    assert run.info.status == "FINISHED"
    assert {item.path for item in _client(uri).list_artifacts(run.info.run_id)} >= {"result.json", "log"}
    _end(process)
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, "tuner.tracking"):
        assert not tracker.log_trial(NIGHT[2], write_trial(results, NIGHT[2]))
        tracker.finish("the end", "FINISHED")
    assert time.monotonic() - begun < 60
    assert f"trial 2 is not in MLflow at {uri}" in caplog.text
    healed = _open(results, database)
    healed.sync(NIGHT)
    assert sorted(_trials(healed, database)) == [0, 1, 2, 3, 4]


def test_a_torn_folder_costs_a_warning_too(
    results: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _open(results, database)
    folder = write_trial(results, NIGHT[0])
    folder.spec.write_text("{")
    assert not tracker.log_trial(NIGHT[0], folder)
    assert str(folder.spec) in caplog.text
    rows: list[TrialRow] = NIGHT
    tracker.sync(rows)
    assert sorted(_trials(tracker, database)) == [1, 2, 3, 4]
