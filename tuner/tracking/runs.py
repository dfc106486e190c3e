"""Writes the MLflow runs of one sweep: the sweep's own MLflow run, and nested in it one MLflow run per trial.

`tuner.tracking.connection` imports this module, after it has set the environment variables that MLflow reads.
"""

import errno
import fcntl
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from tuner.analysis.figures import best_trial
from tuner.errors import InputError
from tuner.files import read_json
from tuner.sweep.folder import SweepFolder
from tuner.tracking.logs import log_tails
from tuner.tracking.names import BEST_METRICS, KIND, RECORD, TRIAL
from tuner.tracking.own_store import artifact_folder, is_own_store
from tuner.tracking.spool import Entry, Spool, Status, SweepClosing
from tuner.tracking.sweep_run import common_tags, ensure_experiment, ensure_sweep_run, public_sweep
from tuner.tracking.uri import reason
from tuner.tracking.values import clip, trial_metrics, trial_parameters, trial_tags
from tuner.trial.contract import Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial

PAGE_RUNS = 500
"""How many MLflow runs one request asks for. Assumed."""


@dataclass(kw_only=True, slots=True)
class MlflowRuns:
    """Writes to MLflow everything of a sweep that MLflow lacks.

    Each trial gets one MLflow run, even if it is logged twice, or by several processes at once. MLflow itself is asked
    which MLflow runs it has. A complete MLflow run has the hash of its trial's record as a tag. An MLflow run without
    this tag was cut short and is replaced, since logged metrics cannot be removed. Every method may raise any error of
    MLflow.
    """

    client: MlflowClient
    uri: str
    results: Path
    """The sweep's folder, as an absolute path."""
    experiment_id: str
    run_id: str
    """The id of the sweep's MLflow run."""
    tags: Mapping[str, str]
    """The tags that the sweep's MLflow run and every trial's MLflow run have."""
    _records: dict[int, list[str]] | None = field(default=None, init=False, repr=False)
    """For each trial number, the hash of the record that MLflow has of the trial; None until MLflow was asked."""

    @classmethod
    def open(cls, client: MlflowClient, folder: SweepFolder, uri: str) -> "MlflowRuns":
        """Find or create the sweep's MLflow run, and return the object that writes to it.

        Args:
            client: a client of the MLflow at `uri`.
            folder: the sweep's folder. Its file `sweep_id`, created here if it is missing, identifies the MLflow run.
            uri: an MLflow tracking URI.

        Raises:
            InputError: if the folder holds no sweep, or the experiment is deleted.
        """
        sweep, results = folder.sweep(), folder.path.absolute()
        with _turn(results):
            tags = common_tags(results, sweep.name)
            experiment_id = ensure_experiment(client, uri, sweep.experiment, results)
            run_id = ensure_sweep_run(client, experiment_id, sweep.name, {**tags, KIND: "sweep"})
            runs = cls(
                client=client, uri=uri, results=results, experiment_id=experiment_id, run_id=run_id, tags=tags
            )
            text = json.dumps(public_sweep(sweep), indent=2)
            runs._log_artifacts(client.get_run(run_id), {"sweep.json": text.encode()})
        return runs

    def catch_up(self, spool: Spool, on_logged: Callable[[Entry], None]) -> bool:
        """Log every finished trial whose MLflow run is missing or outdated, then the sweep's end if it has ended.

        Args:
            spool: reads the finished trials and the sweep's end from the results folder.
            on_logged: called with each finished trial that is up to date in MLflow, whether logged now or before.

        Returns:
            Whether the sweep has ended and MLflow holds this end.

        Raises:
            InputError: naming the trials that cannot be read or that MLflow refuses; all others are logged before.
        """
        entries, problems = spool.entries()
        trials = [entry.trial for entry in entries]
        if self._records is None:
            self._records = self._held_records()
        for entry in entries:
            if self._records.get(entry.trial.number) != [entry.record]:
                try:
                    self._log(entry, trials)
                except Exception as error:
                    # If MLflow still answers this request, the trial is at fault, and the others can be logged.
                    self.client.get_run(self.run_id)
                    problems.append(f"trial {entry.trial.number}: {reason(error, self.uri)}")
                    continue
                self._records[entry.trial.number] = [entry.record]
            on_logged(entry)
        end = spool.end()
        self._set_status(end)
        if problems:
            raise InputError("; ".join(problems))
        return end is not None

    def _held_records(self) -> dict[int, list[str]]:
        """Return, by trial number, the record hash of each MLflow run of the trial; "" for one that was cut short."""
        records: dict[int, list[str]] = defaultdict(list)
        query, token = f"tags.`mlflow.parentRunId` = '{self.run_id}'", None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, max_results=PAGE_RUNS, page_token=token
            )
            for run in page:
                records[int(run.data.tags.get(TRIAL, -1))].append(run.data.tags.get(RECORD, ""))
            token = page.token
            if not token:
                return dict(records)

    def _log(self, entry: Entry, trials: Sequence[FinishedTrial]) -> None:
        """Make sure that MLflow has exactly one MLflow run of a trial, complete and up to date.

        `trials` are all finished trials of the sweep, of which the best is logged with the sweep's MLflow run.
        """
        with _turn(self.results):
            query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`{TRIAL}` = '{entry.trial.number}'"
            runs = list(self.client.search_runs([self.experiment_id], query))
            complete = [run for run in runs if run.data.tags.get(RECORD) == entry.record][:1]
            for run in runs:
                if run not in complete:
                    self.client.delete_run(run.info.run_id)
            if not complete:
                self._create(entry, trials)

    def _create(self, entry: Entry, trials: Sequence[FinishedTrial]) -> None:
        trial, result, folder = entry.trial, entry.trial.result, entry.folder
        spec, end_ms = read_json(TrialSpec, folder.spec), _end_ms(result)
        run: Run = self.client.create_run(
            self.experiment_id,
            start_time=end_ms - round(result.durations.total_s * 1000),
            tags={**self.tags, **trial_tags(spec, trial, folder), "mlflow.parentRunId": self.run_id},
            run_name=f"t{trial.number:04d} {trial.layout.label()}",
        )
        metrics = [Metric(point.name, point.value, end_ms, point.step) for point in trial_metrics(result)]
        params = [Param(name, value) for name, value in trial_parameters(spec).items()]
        self.client.log_batch(run.info.run_id, metrics=metrics, params=params)
        self._log_artifacts(run, _files(result, folder))
        if result.metrics is not None:
            self._log_best(trial, trials)
        self.client.set_terminated(run.info.run_id, _status(result.outcome), end_ms)
        # This tag is set last, so that an MLflow run that has it is complete.
        self.client.set_tag(run.info.run_id, RECORD, entry.record)

    def _log_artifacts(self, run: Run, files: Mapping[str, bytes]) -> None:
        """Store files, given as contents by path, among the artifacts of an MLflow run.

        Raises:
            InputError: if MLflow's store is the SQLite file in the results folder and names an artifact folder outside
                the results folder. A trigger in the database can set such a folder after it was checked.
        """
        with tempfile.TemporaryDirectory() as name:
            for relative, content in files.items():
                path = Path(name, relative)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            if is_own_store(self.results, self.uri):
                # `log_artifacts` would ask the store once more for the folder, and may get another one.
                shutil.copytree(
                    name, artifact_folder(self.results, run.info.artifact_uri), dirs_exist_ok=True
                )
            else:
                self.client.log_artifacts(run.info.run_id, name)

    def _log_best(self, trial: FinishedTrial, trials: Sequence[FinishedTrial]) -> None:
        # Only trials up to this number count, so that the point is the same when the trial is logged again.
        so_far = best_trial(other for other in trials if other.number <= trial.number) or trial
        overall = best_trial(trials) or trial
        points = [
            Metric(point.name, point.value, _end_ms(trial.result), trial.number)
            for point in trial_metrics(so_far.result, BEST_METRICS)
        ]
        tags = {"megatune.best_trial": str(overall.number), "megatune.best_layout": overall.layout.label()}
        self.client.log_batch(
            self.run_id, metrics=points, tags=[RunTag(key, text) for key, text in tags.items()]
        )

    def _set_status(self, end: SweepClosing | None) -> None:
        """Set the status of the sweep's MLflow run, and at the sweep's end its end time and summary.

        An `end` of None means that the sweep is running. Nothing is written if MLflow has this status already.
        """
        run = self.client.get_run(self.run_id)
        info = run.info
        if end is None:
            if info.status != "RUNNING":
                self.client.update_run(self.run_id, status="RUNNING")
        elif (info.status, info.end_time) != (end.status, end.ended_ms):
            self.client.set_tag(self.run_id, "mlflow.note.content", clip(end.summary))
            self._log_artifacts(run, {"summary.md": end.summary.encode()})
            self.client.set_terminated(self.run_id, end.status, end.ended_ms)


@contextmanager
def _turn(results: Path) -> Iterator[None]:
    """Hold a lock of the results folder, so that one process at a time asks what MLflow has of a sweep and adds to it.

    The kernel releases the lock of a process that dies.
    """
    with (results / "mlflow.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # This file system has no locks. Two processes at once are rare, and `_log` later deletes a duplicate.
            if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP}:
                raise
        yield


def _files(result: TrialResult, folder: TrialFolder) -> dict[str, bytes]:
    """Return the files of a trial that are stored in MLflow, as contents by artifact path."""
    records = [path for path in (folder.spec, folder.plan, folder.source, folder.result) if path.exists()]
    return {path.name: path.read_bytes() for path in records} | log_tails(folder, result.rank)


def _status(outcome: Outcome) -> Status:
    if outcome is Outcome.COMPLETED:
        return "FINISHED"
    return "KILLED" if outcome is Outcome.INTERRUPTED else "FAILED"


def _end_ms(result: TrialResult) -> int:
    """Return when a trial ended, in ms since the epoch: the time in its result, or the present if that has none."""
    ended = datetime.fromisoformat(result.finished_at) if result.finished_at else datetime.now(UTC)
    return round(ended.timestamp() * 1000)
