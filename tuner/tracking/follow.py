"""The process that keeps MLflow up to date with a running sweep: `python -m tuner.tracking.follow RESULTS`.

A line on its stdin says that there is something new in the results folder. The process ends at once when its stdin
ends, which also happens when the tuner dies. Each line of its stdout is a JSON object: `logged` lists the numbers of
trials that MLflow has for certain; `trouble` says why MLflow lacks something, is empty if it lacks nothing, and is
null in a line that reports logged trials only. Its stderr is the file mlflow.log. The process ends by itself once
MLflow holds the sweep's end (exit code 0), or if MLflow fails after the sweep has ended (exit code GAVE_UP).
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
"""The wait after MLflow's first failure before the next try, in seconds. Assumed."""

LAST_RETRY_S = 600.0
"""The longest wait before the next try, in seconds; the wait doubles from FIRST_RETRY_S with each failure. Assumed."""

MAX_LOGGED = 20_000
"""The most characters of one text in mlflow.log: an error of MLflow may quote a server's whole answer. Assumed."""


class Log(TextIOBase):
    """A text stream that writes each text without a tracking URI's secrets, cut to MAX_LOGGED characters."""

    def __init__(self, file: TextIO, uri: str) -> None:
        super().__init__()
        self._file, self._uri = file, uri

    def write(self, text: str) -> int:
        """Write a text without secrets and cut to MAX_LOGGED characters; return the length of the whole text."""
        kept = without_secrets(text, self._uri)
        self._file.write(kept if len(kept) <= MAX_LOGGED else f"{kept[:MAX_LOGGED]} ...\n")
        self._file.flush()
        return len(text)


class Follower:
    """Logs to MLflow what is new in a results folder, each time `look` is called.

    Errors of MLflow are never raised: `look` writes them as answers, which are lines of JSON (see the module).
    """

    def __init__(self, results: Path, uri: str, answers: TextIO) -> None:
        self.spool = Spool(results)
        self._uri, self._answers = uri, answers
        self._runs: MlflowRuns | None = None
        self._answered: set[tuple[int, str]] = set()

    def look(self) -> tuple[bool, str]:
        """Log to MLflow everything that it lacks of the sweep.

        Returns:
            Whether MLflow holds the sweep's end; and why something could not be logged, empty if all was.
        """
        try:
            if self._runs is None:
                # MLflow is imported only now: that takes seconds, in which `_listen` must see an end of stdin.
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
    # The tuner is gone. The next process that logs replaces an MLflow run that is half written now.
    os._exit(1)


def _await(news: "SimpleQueue[str]", spool: Spool, retry_s: float | None) -> None:
    """Wait until it is time to look again; empty `news` meanwhile.

    Args:
        news: receives one line whenever there is something new in the results folder.
        spool: reads from the results folder whether the sweep has ended.
        retry_s: after a failure, the seconds to wait. Only the sweep's end shortens this wait, since the tuner then
            waits for this process. None without a failure: the wait ends when `news` receives a line.
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
    """Log the sweep in the folder that the first command-line argument names, until MLflow holds the sweep's end."""
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
    """Log what is new until MLflow holds the sweep's end; exit with GAVE_UP if MLflow fails after the sweep ended."""
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
