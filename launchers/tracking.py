"""Keeps MLflow up to date while a sweep runs, through a separate process for which the sweep never waits."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.tracking_uri import without_password
from tuner.tracking import spool
from tuner.tracking.follow import GAVE_UP
from tuner.tracking.spool import Status as Status
from tuner.tracking.spool import SweepClosing
from tuner.tracking.uri import check_uri, chosen_uri
from tuner.trial.finished import FinishedTrial

_log = logging.getLogger(__name__)

FINISH_S = 20.0
"""The longest time in seconds that a sweep waits at its end until MLflow holds everything. Assumed."""

STARTS_AFTER_S = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0)
"""The waits before each start of the process, in s. A process that was killed or has crashed is started again after
the next wait, until all waits are used. Assumed: half an hour in all."""

_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment variables of the process that stop libraries for linear algebra from starting threads, which take memory
and would have nothing to do."""


class Tracker(Sink):
    """A sink that keeps MLflow up to date with the trial folders while a sweep runs, through a separate process.

    The process spares the tuner the time to import MLflow and to write to it, and can be killed at any moment if a
    server never answers. It ends when the tuner ends, however the tuner ends, and is started again if it ends too
    early. No method waits, except `finish`, for at most FINISH_S seconds. No method raises errors of MLflow. Use the
    tracker as a context manager.
    """

    def __init__(self, results: Path, uri: str, sync: str) -> None:
        """Start the process in the background; use `Tracker.open`, which first prepares the sweep's folder.

        Args:
            results: The sweep's folder.
            uri: The MLflow tracking URI, with its password if it has one.
            sync: The shell command that logs what is missing; warnings name it.
        """
        self.uri = without_password(uri)
        """The tracking URI without its password, to be shown."""
        self._results, self._secret_uri, self._sync = results, uri, sync
        self._finished: set[int] = set()
        self._logged: set[int] = set()
        self._trouble = ""
        self._process: subprocess.Popen[str] | None = None
        self._is_complete = self._is_closing = False
        self._starting = threading.Lock()
        self._is_urgent = threading.Event()
        """Set at the sweep's end and by `close`: it ends the wait before the next start of the process."""
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    @classmethod
    def open(cls, results: Path, uri: str | None) -> "Tracker":
        """Start to log a sweep; earlier trials that MLflow lacks are logged first.

        Args:
            results: The sweep's folder, which holds its sweep.json.
            uri: The MLflow tracking URI in the user's sweep file. None takes the environment variable
                MLFLOW_TRACKING_URI, and if that is not set the SQLite store in the sweep's folder.

        Raises:
            InputError: if MLflow does not support the URI's scheme.
        """
        chosen = chosen_uri(results, uri)
        check_uri(chosen)
        spool.note_start(results)
        _log_file(results).unlink(missing_ok=True)
        sync = ["megatune", "sync", str(results), *(() if uri is None else ("--uri", uri))]
        return cls(results, chosen, shlex.join(sync))

    @property
    def process_id(self) -> int | None:
        """The id of the process that logs, which may have ended; None before its first start."""
        return self._process.pid if self._process else None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def opened(self, snapshot: Snapshot, table: pd.DataFrame) -> None:
        """Have the process log the finished trials that MLflow lacks or holds with another result (see Sink)."""
        self._finished |= {trial.number for trial in snapshot.state.ended}
        self._wake()

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """Have the process log the trial from its folder (see Sink); a new result replaces the trial's MLflow run."""
        self._logged.discard(trial.number)
        self._finished.add(trial.number)
        self._wake()

    def finish(self, summary: str, status: Status) -> None:
        """End the sweep's MLflow run with a status and a summary in Markdown.

        Waits until MLflow holds everything, for at most FINISH_S seconds, and warns if it then lacks something.
        """
        try:
            spool.note_end(
                self._results,
                SweepClosing(status=status, ended_ms=round(time.time() * 1000), summary=summary),
            )
        except OSError as error:
            self._trouble = f"the sweep's end cannot be noted: {error}"
        else:
            self._is_urgent.set()
            self._wake()
            # The process ends by itself once MLflow holds everything.
            self._supervisor.join(FINISH_S / 10)
            if self._supervisor.is_alive():
                _log.warning("logging the rest to MLflow at %s, for at most %g s", self.uri, FINISH_S)
                self._supervisor.join(FINISH_S * 0.9)
        self.close()
        missing = len(self._finished - self._logged)
        if missing or not self._is_complete:
            subject = f"{missing} of {len(self._finished)} trials are" if missing else "the sweep's end is"
            _log.warning(
                "%s not known to be in MLflow at %s (%s); `%s` logs what is missing",
                subject,
                self.uri,
                self._trouble or f"it took longer than {FINISH_S:g} s",
                self._sync,
            )

    def close(self) -> None:
        """Kill the process, whatever it is doing. The next process that logs replaces an MLflow run left incomplete."""
        with self._starting:
            self._is_closing = True
        self._is_urgent.set()
        if self._process:
            self._process.kill()
        self._supervisor.join()

    def _wake(self) -> None:
        """Tell the process that there is something new; a process that starts later looks without being told."""
        process = self._process
        if process is not None:
            assert process.stdin is not None
            # `_supervise` reports a process that has ended.
            with suppress(OSError, ValueError):
                process.stdin.write("\n")
                process.stdin.flush()

    def _supervise(self) -> None:
        """Keep the process running until MLflow holds everything, the tracker is closed, or all starts are used."""
        for wait_s in STARTS_AFTER_S:
            self._is_urgent.wait(wait_s)
            try:
                code = self._run()
            except (
                OSError
            ) as error:  # the machine has no room for another process, or the disk none for its log
                end = f"cannot be started: {error}"
            else:
                self._is_complete = code == 0
                if code is None or code in (0, GAVE_UP) or self._is_closing:
                    return
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                end = f"ended with {how}, see {_log_file(self._results)}"
            self._warn(f"its process {end}")
        _log.warning(
            "the process that logs to MLflow has ended %d times and is not started again; `%s` logs what is missing",
            len(STARTS_AFTER_S),
            self._sync,
        )

    def _run(self) -> int | None:
        """Start the process, read its answers until it ends, and return its exit code.

        If the tracker is closed, start nothing and return None.
        """
        with self._starting:
            if self._is_closing:
                return None
            process = self._process = self._start()
        assert process.stdin is not None and process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                with suppress(ValueError):  # a process that is killed may leave half a line
                    self._take(json.loads(line))
        code = process.wait()
        with suppress(OSError):
            process.stdin.close()
        return code

    def _start(self) -> "subprocess.Popen[str]":
        with open(_log_file(self._results), "ab", opener=_private) as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "tuner.tracking.follow", str(self._results)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Ctrl-C must reach the tuner alone: the end of the sweep is still to be logged.
                start_new_session=True,
                # A URI may hold a password, and every user of the machine can read a process's arguments.
                env=os.environ | _SINGLE_THREAD | {"MLFLOW_TRACKING_URI": self._secret_uri},
            )

    def _take(self, answer: dict[str, Any]) -> None:
        self._logged |= set(answer["logged"])
        if answer["trouble"] is not None:
            self._warn(answer["trouble"])

    def _warn(self, trouble: str) -> None:
        """Log a warning if trouble has begun or ended; an empty `trouble` means that there is none now."""
        if trouble and not self._trouble:
            _log.warning(
                "MLflow at %s cannot be used now (%s); the sweep goes on, and what is missing there is logged later",
                self.uri,
                trouble,
            )
        elif self._trouble and not trouble:
            _log.warning("MLflow at %s answers again", self.uri)
        self._trouble = trouble


def _log_file(results: Path) -> Path:
    """Return the path of the file that receives MLflow's errors."""
    return results / "mlflow.log"


def _private(path: str, flags: int) -> int:
    """Open a file, created with access for this user only; return its descriptor. Serves as the `opener` of `open`."""
    return os.open(path, flags, 0o600)
