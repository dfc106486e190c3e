"""Keeps MLflow, a view of the trial folders, in step with a sweep: in a process of its own that nobody waits for."""

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pandas as pd

from tuner.sweep.sinks import Sink, Snapshot
from tuner.tracking import spool
from tuner.tracking.follow import GAVE_UP
from tuner.tracking.spool import Status as Status
from tuner.tracking.spool import SweepClosing
from tuner.tracking.uri import check_uri, default_uri, without_password
from tuner.trial.finished import FinishedTrial

_log = logging.getLogger(__name__)

FINISH_S = 20.0
"""How long the end of a sweep waits until MLflow holds everything. Assumed: short against a sweep."""


class Tracker(Sink):
    """Keeps MLflow in step with the trial folders while a sweep runs, through a process of its own.

    It is a process and no thread, so that importing MLflow and writing to it takes none of the tuner's own time, and a
    server that never answers can be left at any moment. The process ends with the tuner, however the tuner ends. No
    method waits, except `finish` for at most FINISH_S, and none raises for what MLflow does. Use it as a context
    manager.
    """

    def __init__(self, process: "subprocess.Popen[str]", results: Path, uri: str) -> None:
        """Use `Tracker.open`."""
        self.uri = without_password(uri)
        """The tracking URI without its password, to be shown."""
        self.process_id = process.pid
        self._process, self._results = process, results
        self._finished: set[int] = set()
        self._logged: set[int] = set()
        self._trouble, self._is_closing = "", False
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    @classmethod
    def open(cls, results: Path, uri: str | None) -> "Tracker":
        """Start to log a sweep; trials that MLflow lacks are logged first.

        Args:
            results: The sweep's folder, which holds its sweep.json.
            uri: An MLflow tracking URI; None takes the default one.

        Raises:
            InputError: if no MLflow store takes the URI.
        """
        chosen = uri or default_uri(results)
        check_uri(chosen)
        spool.note_start(results)
        with (results / "mlflow.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tuner.tracking.follow", str(results)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Ctrl-C must reach the tuner alone: the end of the sweep is still to be logged.
                start_new_session=True,
                # A URI may hold a password, and every user of the machine can read a process's arguments.
                env=os.environ | {"MLFLOW_TRACKING_URI": chosen},
            )
        return cls(process, results, chosen)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def opened(self, snapshot: Snapshot, table: pd.DataFrame) -> None:
        """See Sink. Finished trials that MLflow lacks, or holds with another result, are logged."""
        self._finished |= {trial.number for trial in snapshot.state.ended}
        self._wake()

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """See Sink. The trial is logged from its folder; a new result replaces the trial's MLflow run."""
        self._logged.discard(trial.number)
        self._finished.add(trial.number)
        self._wake()

    def finish(self, summary: str, status: Status) -> None:
        """End the sweep's MLflow run with its summary in Markdown; warn if MLflow lacks something after FINISH_S."""
        try:
            spool.note_end(
                self._results,
                SweepClosing(status=status, ended_ms=round(time.time() * 1000), summary=summary),
            )
        except OSError as error:
            self._trouble = f"the sweep's end cannot be noted: {error}"
        else:
            self._wake()
            # The process ends by itself once MLflow holds everything.
            self._reader.join(FINISH_S / 10)
            if self._reader.is_alive():
                _log.warning("logging the rest to MLflow at %s, for at most %g s", self.uri, FINISH_S)
                self._reader.join(FINISH_S * 0.9)
        self.close()
        missing = len(self._finished - self._logged)
        if missing or self._process.returncode != 0:
            subject = f"{missing} of {len(self._finished)} trials are" if missing else "the sweep's end is"
            _log.warning(
                "%s not known to be in MLflow at %s (%s); `%s` logs what is missing",
                subject,
                self.uri,
                self._trouble or f"it took longer than {FINISH_S:g} s",
                f"megatune sync {shlex.quote(str(self._results))}",
            )

    def close(self) -> None:
        """End the process, whatever it is doing; the next process to log replaces an MLflow run that is cut short."""
        self._is_closing = True
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()

    def _wake(self) -> None:
        assert self._process.stdin is not None
        # A process that has ended was reported by `_listen`.
        with suppress(OSError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        """Read the process's answers until it ends."""
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                answer = json.loads(line)
                self._logged |= set(answer["logged"])
                if answer["trouble"] is not None:
                    self._warn(answer["trouble"])
        code = self._process.wait()
        if code not in (0, GAVE_UP) and not self._is_closing:
            self._warn(f"its process ended with exit code {code}, see {self._results / 'mlflow.log'}")

    def _warn(self, trouble: str) -> None:
        """Log a warning where trouble begins or ends; an empty text is no trouble."""
        if trouble and not self._trouble:
            _log.warning(
                "MLflow at %s cannot be used now (%s); the sweep goes on, and what is missing there is logged later",
                self.uri,
                trouble,
            )
        elif self._trouble and not trouble:
            _log.warning("MLflow at %s answers again", self.uri)
        self._trouble = trouble
