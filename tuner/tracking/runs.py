"""The MLflow runs of one sweep: one for the sweep, and nested in it one for each trial; no rank writes them."""

import errno
import fcntl
import logging
import os
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.update(
    {
        # Clusters are often cut off from the internet, and a tuner phones nobody home; MLflow reads this on import.
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # MLflow's own limits add up to many minutes a call, and a request that it repeats may create a run twice.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        **os.environ,
    }
)

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.git_utils import get_git_commit

from tuner.analysis.figures import best
from tuner.errors import InputError
from tuner.files import read_json, to_data, write_text
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import SweepFolder
from tuner.tracking.names import (
    BEST_METRICS,
    KIND,
    RECORD,
    SWEEP,
    SWEEP_ID,
    TRIAL,
    clip,
    trial_metrics,
    trial_parameters,
    trial_tags,
)
from tuner.tracking.spool import Entry, Spool, Status, SweepEnd
from tuner.tracking.uri import reason, without_password
from tuner.trial.contract import Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial

LOG_TAIL_BYTES = 64 * 1024
"""Of each log file, its end is kept in MLflow; the whole lies in the trial's folder."""
LOG_TOTAL_BYTES = 1024 * 1024
"""Of all log files of a trial together: thousands of ranks write thousands of files."""

PAGE = 500
"""Runs asked of MLflow at once."""


class MlflowRuns:
    """Writes to MLflow what it misses of a sweep, exactly once, however often and by however many it is called.

    MLflow itself is asked what it holds. A run carries the hash of its trial's record once it is whole; one without it
    was cut short and is replaced, since metrics cannot be taken back. Every method raises whatever MLflow raises.
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
        """Use `MlflowRuns.open`."""
        self.experiment_id = experiment_id
        self.run_id = run_id
        """Of the sweep's run."""
        self._client, self._uri, self._results, self._common = client, uri, results, common
        self._held: dict[int, list[str]] | None = None

    @classmethod
    def open(cls, folder: SweepFolder, uri: str) -> "MlflowRuns":
        """Connect, and create the sweep's run, or find it again.

        Args:
            folder: the sweep's. Its file `sweep_id`, created here, is what finds the run again.
            uri: an MLflow tracking URI.

        Raises:
            InputError: where the folder holds no sweep, or the experiment is deleted.
        """
        # Migrations, retries and tracebacks are kept off the terminal: what fails is raised besides.
        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sweep, results = folder.sweep(), folder.path.absolute()
        client = MlflowClient(tracking_uri=uri)
        with _alone(results):
            common = _common_tags(results, sweep.name)
            experiment_id = _experiment(client, uri, sweep.experiment, results)
            run_id = _sweep_run(client, experiment_id, sweep.name, {**common, KIND: "sweep"})
            client.log_dict(run_id, _told(sweep), "sweep.json")
        return cls(client, uri, results, experiment_id, run_id, common)

    def catch_up(self, spool: Spool, logged: Callable[[Entry], None]) -> bool:
        """Log every finished trial that MLflow misses or holds with another record, and the sweep's end.

        Args:
            spool: what MLflow should hold.
            logged: told each trial once MLflow is known to hold it.

        Returns:
            Whether the sweep's end is there too.

        Raises:
            InputError: naming the trials that cannot be read or that MLflow refuses, after all others are logged.
        """
        entries, problems = spool.entries()
        rows = [entry.row for entry in entries]
        if self._held is None:
            self._held = self._records()
        for entry in entries:
            if self._held.get(entry.row.number) != [entry.record]:
                try:
                    self._log(entry, rows)
                except Exception as error:
                    # Where MLflow still answers the trial is at fault, and the others need not wait for it.
                    self._client.get_run(self.run_id)
                    problems.append(f"trial {entry.row.number}: {reason(error, self._uri)}")
                    continue
                self._held[entry.row.number] = [entry.record]
            logged(entry)
        end = spool.end()
        self._set_status(end)
        if problems:
            raise InputError("; ".join(problems))
        return end is not None

    def _records(self) -> dict[int, list[str]]:
        """The records of all trials' runs by the trial's number, an empty one for a run that was cut short."""
        held: dict[int, list[str]] = defaultdict(list)
        query, token = f"tags.`mlflow.parentRunId` = '{self.run_id}'", None
        while True:
            runs = self._client.search_runs([self.experiment_id], query, max_results=PAGE, page_token=token)
            for run in runs:
                held[int(run.data.tags.get(TRIAL, -1))].append(run.data.tags.get(RECORD, ""))
            token = runs.token
            if not token:
                return dict(held)

    def _log(self, entry: Entry, rows: Sequence[FinishedTrial]) -> None:
        with _alone(self._results):
            query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`{TRIAL}` = '{entry.row.number}'"
            found = list(self._client.search_runs([self.experiment_id], query))
            whole = [run for run in found if run.data.tags.get(RECORD) == entry.record][:1]
            for run in found:
                if run not in whole:
                    self._client.delete_run(run.info.run_id)
            if not whole:
                self._create(entry, rows)

    def _create(self, entry: Entry, rows: Sequence[FinishedTrial]) -> None:
        row, folder = entry.row, entry.folder
        spec, end_ms = read_json(TrialSpec, folder.spec), _end_ms(row.result)
        run: Run = self._client.create_run(
            self.experiment_id,
            start_time=end_ms - round(row.result.durations.total_s * 1000),
            tags={**self._common, **trial_tags(spec, row, folder), "mlflow.parentRunId": self.run_id},
            run_name=f"t{row.number:04d} {row.layout.label()}",
        )
        metrics = [Metric(name, value, end_ms, step) for name, value, step in trial_metrics(row.result)]
        params = [Param(name, value) for name, value in trial_parameters(spec).items()]
        self._client.log_batch(run.info.run_id, metrics=metrics, params=params)
        self._log_artifacts(run.info.run_id, row.result, folder)
        if row.result.metrics is not None:
            self._log_best(row, rows)
        self._client.set_terminated(run.info.run_id, _status(row.result.outcome), end_ms)
        # Last, for a run that has it is whole.
        self._client.set_tag(run.info.run_id, RECORD, entry.record)

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

    def _log_best(self, row: FinishedTrial, rows: Sequence[FinishedTrial]) -> None:
        # The best among this and earlier numbers: the same point whenever and however often it is logged.
        so_far = best(other for other in rows if other.number <= row.number) or row
        overall = best(rows) or row
        points = [
            Metric(name, value, _end_ms(row.result), row.number)
            for name, value, _ in trial_metrics(so_far.result, BEST_METRICS)
        ]
        tags = {"megatune.best_trial": str(overall.number), "megatune.best_layout": overall.layout.label()}
        self._client.log_batch(
            self.run_id, metrics=points, tags=[RunTag(key, text) for key, text in tags.items()]
        )

    def _set_status(self, end: SweepEnd | None) -> None:
        """Bring the sweep's run to its end, or back to running; nothing where it already is as it should be."""
        info = self._client.get_run(self.run_id).info
        if end is None:
            if info.status != "RUNNING":
                self._client.update_run(self.run_id, status="RUNNING")
        elif (info.status, info.end_time) != (end.status, end.ended_ms):
            self._client.set_tag(self.run_id, "mlflow.note.content", clip(end.summary))
            self._client.log_text(self.run_id, end.summary, "summary.md")
            self._client.set_terminated(self.run_id, end.status, end.ended_ms)


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


@contextmanager
def _alone(results: Path) -> Iterator[None]:
    """One process at a time asks what MLflow holds of this sweep and adds to it; the kernel ends a dead one's turn."""
    with (results / "mlflow.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # A file system without locks: two at once are rare, and the next look mends what they doubled.
            if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP}:
                raise
        yield


def _told(sweep: Sweep) -> dict[str, Any]:
    """The sweep as others may read it: its URI may hold a password."""
    uri = sweep.tracking.uri
    tracking = replace(sweep.tracking, uri=uri and without_password(uri))
    told: dict[str, Any] = to_data(replace(sweep, tracking=tracking))
    return told


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
            f"experiment '{name}' is deleted, and MLflow keeps its name: restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}) or name another one (tracking.experiment in the sweep file)"
        )
    return str(found.experiment_id)


def _sweep_run(client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    query = f"tags.`{SWEEP_ID}` = '{tags[SWEEP_ID]}' and tags.`{KIND}` = 'sweep'"
    found = client.search_runs([experiment_id], query, max_results=1)
    if not found:
        return str(client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id)
    run_id = str(found[0].info.run_id)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run_id


def _sweep_id(results: Path) -> str:
    """The identity of a results folder: two nights may share a sweep's name and a server, not this."""
    path = results / "sweep_id"
    if not path.exists():
        write_text(path, f"{uuid.uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


def _status(outcome: Outcome) -> Status:
    if outcome is Outcome.COMPLETED:
        return "FINISHED"
    return "KILLED" if outcome is Outcome.INTERRUPTED else "FAILED"


def _end_ms(result: TrialResult) -> int:
    """The trial's end in milliseconds since the epoch, so that a rebuilt view shows the same times."""
    ended = datetime.fromisoformat(result.finished_at) if result.finished_at else datetime.now(UTC)
    return round(ended.timestamp() * 1000)
