"""MLflow: a view of the trial folders, which stay the truth. Only the controller logs, never a rank."""

import logging
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

# Clusters are often cut off from the internet, and a tuner phones nobody home; MLflow reads this on import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.git_utils import get_git_commit

from tuner.errors import InputError
from tuner.files import read_json, to_data, write_text
from tuner.mlflow_names import (
    BEST_METRICS,
    KIND,
    RECORD,
    SWEEP,
    SWEEP_ID,
    TRIAL,
    clip,
    digest,
    trial_metrics,
    trial_parameters,
    trial_tags,
)
from tuner.report import TrialRow, best, trial_folder
from tuner.trial import Outcome, TrialFolder, TrialResult, TrialSpec

_log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

LOG_TAIL_BYTES = 64 * 1024
"""Of each log file, its end is kept in MLflow; the whole lies in the trial's folder."""
LOG_TOTAL_BYTES = 1024 * 1024
"""Of all log files of a trial together: thousands of ranks write thousands of files."""


def default_uri(results: Path) -> str:
    """Where MLflow is without a stated URI: MLFLOW_TRACKING_URI, else SQLite in the sweep's folder."""
    # Absolute, since MLflow takes a relative one from the working directory of whoever asks.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.absolute() / 'mlflow.db'}"


class Tracker:
    """The MLflow runs of one sweep: one for the sweep, and nested in it one for each trial.

    Once open, nothing that MLflow does ends a sweep: a failure is a warning, and `sync` heals it later.
    """

    def __init__(
        self,
        client: MlflowClient,
        uri: str,
        results: Path,
        experiment_id: str,
        run_id: str,
        common: Mapping[str, str],
    ) -> None:
        """Use `Tracker.open`."""
        self.uri = uri
        """To show: without a password."""
        self.experiment_id = experiment_id
        self.run_id = run_id
        """Of the sweep's run."""
        self._client = client
        self._results = results
        self._common = common
        self._completed: dict[int, TrialRow] = {}

    @classmethod
    def open(
        cls, results: Path, uri: str | None, experiment: str, sweep_name: str, tags: Mapping[str, str]
    ) -> "Tracker":
        """Connect, and create the sweep's run, or find it again and reopen it.

        Args:
            results: the sweep's folder. Its file `sweep_id`, created here, is what finds the run again.
            uri: an MLflow tracking URI; None takes the default one.
            experiment: name of the experiment, created where it is missing.
            sweep_name: name of the sweep's run.
            tags: further tags of the sweep's run.

        Raises:
            InputError: where MLflow cannot be used, naming the URI and what to do.
        """
        _silence()
        results = results.absolute()
        chosen = uri or default_uri(results)
        shown = _without_password(chosen)
        common = _common_tags(results, sweep_name)
        try:
            with _bounded_requests():
                client = MlflowClient(tracking_uri=chosen)
                experiment_id = _experiment(client, chosen, experiment, results)
                run_id = _sweep_run(client, experiment_id, sweep_name, {**tags, **common, KIND: "sweep"})
                for path in (results / "sweep.yaml", results / "sweep.json"):
                    if path.exists():
                        client.log_artifact(run_id, str(path))
        except InputError:
            raise
        # Not MlflowException alone: a wrong URI raises SQLAlchemy's, requests' and import errors too.
        except Exception as error:
            raise InputError(
                f"MLflow at {shown} cannot be used: {_first_line(error).replace(chosen, shown)}. Start that "
                "server or correct the URI (tracking.uri in the sweep file, or the variable "
                f"MLFLOW_TRACKING_URI); with both unset the sweep logs to SQLite in {results}"
            ) from None
        return cls(client, shown, results, experiment_id, run_id, common)

    def log_trial(self, row: TrialRow, folder: TrialFolder) -> bool:
        """Log a finished trial. The same result again does nothing; another result replaces the trial's run.

        Returns:
            Whether the trial is in MLflow now. Never raises for what MLflow does.
        """
        try:
            with _bounded_requests():
                self._log_trial(row, read_json(TrialSpec, folder.spec), folder)
        # Whatever a store, a server or a full disk raises: the view must not end the sweep.
        except Exception as error:
            _log.warning(
                "trial %d is not in MLflow at %s (%s); resuming the sweep logs it",
                row.number,
                self.uri,
                _first_line(error),
            )
            return False
        return True

    def sync(self, rows: Iterable[TrialRow]) -> None:
        """Log every finished trial that MLflow misses, or has with another result."""
        for row in rows:
            self.log_trial(row, trial_folder(self._results, row.number))

    def finish(self, summary: str, status: Status) -> None:
        """End the sweep's run with its summary in Markdown; never raises for what MLflow does."""
        try:
            with _bounded_requests():
                self._client.set_tag(self.run_id, "mlflow.note.content", clip(summary))
                self._client.log_text(self.run_id, summary, "summary.md")
                self._client.set_terminated(self.run_id, status)
        except Exception as error:
            _log.warning("the sweep's end is not in MLflow at %s (%s)", self.uri, _first_line(error))

    def _log_trial(self, row: TrialRow, spec: TrialSpec, folder: TrialFolder) -> None:
        record = digest({"result": to_data(row.result), "source": row.source, "note": row.note})
        known = self._trial_runs(row.number)
        if not any(run.data.tags.get(RECORD) == record for run in known):
            run_id = self._create_trial_run(row, spec, trial_tags(spec, row, folder))
            self._log_artifacts(run_id, row.result, folder)
            self._client.set_terminated(run_id, _status(row.result.outcome), _end_ms(row.result))
            self._client.set_tag(run_id, RECORD, record)
        # Metrics cannot be taken back, so what an incomplete or outdated run holds goes with the run.
        for run in known:
            if run.data.tags.get(RECORD) != record:
                self._client.delete_run(run.info.run_id)
        if row.result.metrics is not None:
            self._log_best(row)

    def _trial_runs(self, number: int) -> list[Run]:
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`{TRIAL}` = '{number}'"
        return list(self._client.search_runs([self.experiment_id], query))

    def _create_trial_run(self, row: TrialRow, spec: TrialSpec, tags: Mapping[str, str]) -> str:
        end_ms = _end_ms(row.result)
        run = self._client.create_run(
            self.experiment_id,
            start_time=end_ms - round(row.result.durations.total_s * 1000),
            tags={**self._common, **tags, "mlflow.parentRunId": self.run_id},
            run_name=f"t{row.number:04d} {row.layout.label()}",
        )
        run_id: str = run.info.run_id
        metrics = [Metric(name, value, end_ms, step) for name, value, step in trial_metrics(row.result)]
        params = [Param(name, value) for name, value in trial_parameters(spec).items()]
        self._client.log_batch(run_id, metrics=metrics, params=params)
        return run_id

    def _log_artifacts(self, run_id: str, result: TrialResult, folder: TrialFolder) -> None:
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            for path in (folder.spec, folder.plan, folder.source, folder.result):
                if path.exists():
                    (copy / path.name).write_bytes(path.read_bytes())
            for relative, tail in log_tails(folder, result.rank).items():
                (copy / relative).parent.mkdir(parents=True, exist_ok=True)
                (copy / relative).write_bytes(tail)
            self._client.log_artifacts(run_id, name)

    def _log_best(self, row: TrialRow) -> None:
        self._completed[row.number] = row
        # The best among this and earlier numbers: the same whenever and however often a trial is logged.
        so_far = best(other for other in self._completed.values() if other.number <= row.number) or row
        overall = best(self._completed.values()) or row
        points = [
            Metric(name, value, _end_ms(row.result), row.number)
            for name, value, _ in trial_metrics(so_far.result, BEST_METRICS)
        ]
        tags = {"megatune.best_trial": str(overall.number), "megatune.best_layout": overall.layout.label()}
        self._client.log_batch(
            self.run_id, metrics=points, tags=[RunTag(key, text) for key, text in tags.items()]
        )


def log_tails(folder: TrialFolder, rank: int | None) -> dict[str, bytes]:
    """The ends of a trial's log files by path, within the bounds above; those of `rank` first."""
    files = [path for path in sorted(folder.log.rglob("*")) if path.is_file() and path.stat().st_size]
    # False sorts first: a file is the rank's where a part of its path is the rank's number.
    files.sort(key=lambda path: str(rank) not in path.relative_to(folder.log).parts)
    tails: dict[str, bytes] = {}
    left = LOG_TOTAL_BYTES
    for path in files:
        if left <= 0:
            break
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - min(LOG_TAIL_BYTES, left)))
            tail = file.read(min(LOG_TAIL_BYTES, left))
        tails[str(path.relative_to(folder.path))] = tail
        left -= len(tail)
    return tails


def _common_tags(results: Path, sweep_name: str) -> dict[str, str]:
    tags = {SWEEP: sweep_name, SWEEP_ID: _sweep_id(results)}
    # A checkout on PYTHONPATH, as under Slurm, has no package version; its commit says more.
    with suppress(PackageNotFoundError):
        tags["megatune.version"] = version("megatune")
    commit = get_git_commit(str(Path.cwd()))
    return {**tags, "mlflow.source.git.commit": commit} if commit else tags


def _experiment(client: MlflowClient, uri: str, name: str, results: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without a server MLflow would put artifacts under the working directory of whoever came first.
        database = urlsplit(uri).scheme.split("+")[0] in {"sqlite", "postgresql", "mysql", "mssql"}
        location = (results / "mlartifacts").as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another sweep may have created it in between.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise InputError(
            f"MLflow experiment '{name}' at {_without_password(uri)} is deleted, and MLflow keeps its name: "
            f"restore it (mlflow experiments restore --experiment-id {found.experiment_id}) or name another "
            "one (tracking.experiment in the sweep file)"
        )
    return str(found.experiment_id)


def _sweep_run(client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    query = f"tags.`{SWEEP_ID}` = '{tags[SWEEP_ID]}' and tags.`{KIND}` = 'sweep'"
    found = client.search_runs([experiment_id], query, max_results=1)
    if not found:
        return str(client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id)
    run_id = str(found[0].info.run_id)
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run_id


def _sweep_id(results: Path) -> str:
    """The identity of a results folder: two nights may share a sweep's name and a server, not this."""
    path = results / "sweep_id"
    if not path.exists():
        results.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{uuid.uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def _bounded_requests() -> Iterator[None]:
    """Bound how long a silent server holds the sweep: MLflow's own limits add up to many minutes a call."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _silence() -> None:
    """Keep migrations, retries and tracebacks off the terminal: what fails is raised besides."""
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _status(outcome: Outcome) -> Status:
    if outcome is Outcome.COMPLETED:
        return "FINISHED"
    return "KILLED" if outcome is Outcome.INTERRUPTED else "FAILED"


def _end_ms(result: TrialResult) -> int:
    """The trial's end in milliseconds since the epoch, so that a rebuilt view shows the same times."""
    ended = datetime.fromisoformat(result.finished_at) if result.finished_at else datetime.now(UTC)
    return round(ended.timestamp() * 1000)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return clip(text.splitlines()[0]).rstrip(".")


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))
