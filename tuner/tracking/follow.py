"""The process that keeps MLflow in step with a running sweep: `python -m tuner.tracking.follow RESULTS`.

A line on its stdin says that there is something new in the folder. The end of its stdin, which also comes when the
tuner dies, ends it at once. Each line of its stdout is JSON: the numbers of the trials that MLflow is now known to hold
(`logged`), and what keeps the others out (`trouble`, null if nothing is said about it). Its stderr is mlflow.log. The
process ends by itself once MLflow holds the sweep's end, or has refused it (exit code GAVE_UP).
"""

import json
import os
import sys
import threading
import time
import traceback
from io import TextIOBase
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TextIO

from tuner.sweep.folder import SweepFolder
from tuner.tracking.connection import open_runs
from tuner.tracking.memory import bounded_memory
from tuner.tracking.spool import Entry, Spool
from tuner.tracking.uri import reason, without_secrets

if TYPE_CHECKING:
    from tuner.tracking.runs import MlflowRuns

GAVE_UP = 3
"""The exit code of the process if MLflow fails after the sweep has ended."""

FIRST_RETRY_S = 30.0
"""How long MLflow is left alone after its first failure. Assumed."""

LAST_RETRY_S = 600.0
"""The longest that MLflow is left alone; the time doubles from FIRST_RETRY_S with each failure. Assumed."""

MAX_LOGGED = 20_000
"""The largest number of characters that are logged at once: the error of a server quotes its answer. Assumed."""


class Log(TextIOBase):
    """Writes to a text file without the secrets of a tracking URI, and at most MAX_LOGGED characters at once."""

    def __init__(self, file: TextIO, uri: str) -> None:
        super().__init__()
        self._file, self._uri = file, uri

    def write(self, text: str) -> int:
        """Write a text, as it may be kept."""
        kept = without_secrets(text, self._uri)
        self._file.write(kept if len(kept) <= MAX_LOGGED else f"{kept[:MAX_LOGGED]} ...\n")
        self._file.flush()
        return len(text)


class Follower:
    """Logs what is new each time it is asked to; an error of MLflow becomes an answer and never raises."""

    def __init__(self, results: Path, uri: str, answers: TextIO) -> None:
        self.spool = Spool(results)
        self._uri, self._answers = uri, answers
        self._runs: MlflowRuns | None = None
        self._answered: set[tuple[int, str]] = set()

    def look(self) -> tuple[bool, str]:
        """Log what MLflow lacks.

        Returns:
            Whether MLflow holds the sweep's end, and what kept it from taking something; empty if nothing did.
        """
        try:
            if self._runs is None:
                # MLflow is opened only here: it takes seconds, and the end of stdin must be seen meanwhile.
                self._runs = open_runs(SweepFolder(self.spool.results), self._uri)
            has_ended, trouble = self._runs.catch_up(self.spool, self._logged), ""
        # A store, a server or a full disk may raise anything. The next look opens MLflow again.
        except Exception as error:
            self._runs, has_ended, trouble = None, False, reason(error, self._uri)
            sys.stderr.write(traceback.format_exc())
        self._answer([], trouble)
        return has_ended, trouble

    def _logged(self, entry: Entry) -> None:
        logged = (entry.trial.number, entry.record)
        if logged not in self._answered:
            self._answered.add(logged)
            self._answer([entry.trial.number], None)

    def _answer(self, logged: list[int], trouble: str | None) -> None:
        self._answers.write(json.dumps({"logged": logged, "trouble": trouble}) + "\n")
        self._answers.flush()


def _listen(news: "SimpleQueue[str]") -> None:
    """Put each line of stdin into `news`, and end the process at the end of stdin."""
    for line in sys.stdin:
        news.put(line)
    # The tuner is gone. Whoever logs next replaces an MLflow run that is half written now.
    os._exit(1)


def _await(news: "SimpleQueue[str]", spool: Spool, retry_s: float | None) -> None:
    """Wait until there is something to log.

    Args:
        news: holds a line per piece of news.
        spool: says whether the sweep has ended.
        retry_s: the seconds until the next try after a failure. Only the sweep's end cuts them short, since the tuner
            then waits for this process. None without a failure: the next news ends the wait.
    """
    until_s = None if retry_s is None else time.monotonic() + retry_s
    while True:
        try:
            news.get(timeout=None if until_s is None else max(0.0, until_s - time.monotonic()))
        except Empty:
            return
        while not news.empty():
            news.get()
        if until_s is None or spool.end() is not None:
            return


def main() -> None:
    """Follow the sweep in the folder that the first argument names, until MLflow holds its end."""
    os.nice(10)  # the trials that are measured at the same time come first
    news: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(news,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to stderr, so that stdout holds answers only
    uri = os.environ["MLFLOW_TRACKING_URI"]
    sys.stdout = sys.stderr = Log(sys.stderr, uri)
    with bounded_memory():
        _follow(Follower(Path(sys.argv[1]), uri, answers), news)


def _follow(follower: Follower, news: "SimpleQueue[str]") -> None:
    """Log whatever is new until MLflow holds the sweep's end; ends the process with GAVE_UP if MLflow refuses that."""
    retry_s = FIRST_RETRY_S
    while True:
        is_last_look = follower.spool.end() is not None
        has_ended, trouble = follower.look()
        if has_ended:
            return
        if is_last_look and trouble:
            sys.exit(GAVE_UP)
        _await(news, follower.spool, retry_s if trouble else None)
        retry_s = min(2 * retry_s, LAST_RETRY_S) if trouble else FIRST_RETRY_S


if __name__ == "__main__":
    main()
