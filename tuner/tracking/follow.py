"""The process that keeps MLflow in step with a running sweep: `python -m tuner.tracking.follow RESULTS`.

A line on its input says that there is something new in the folder; the end of its input ends it at once, as the
tuner's death does. On its output it answers in lines of JSON: the numbers of trials that MLflow newly is known to hold,
and what keeps it from the rest. It ends by itself once MLflow holds the sweep's end, or refuses it (GAVE_UP).
"""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TextIO

from tuner.sweep.folder import SweepFolder
from tuner.tracking.spool import Entry, Spool
from tuner.tracking.spool import Status as Status
from tuner.tracking.uri import reason, without_password

if TYPE_CHECKING:
    from tuner.tracking.runs import MlflowRuns

GAVE_UP = 3
"""Exit code of the process where MLflow failed at the sweep's end."""

FIRST_RETRY_S = 30.0
LAST_RETRY_S = 600.0
"""How long MLflow is left alone after it failed: doubled from the one to the other."""


class Follower:
    """Logs what is new whenever it is asked to, whatever MLflow does."""

    def __init__(self, results: Path, uri: str, answers: TextIO) -> None:
        self.spool = Spool(results)
        self._uri, self._answers = uri, answers
        self._runs: MlflowRuns | None = None
        self._answered: set[tuple[int, str]] = set()

    def look(self) -> tuple[bool, str]:
        """Log what is missing; returns whether MLflow holds the sweep's end, and what kept it from something."""
        try:
            if self._runs is None:
                # Late, since it takes seconds, in which the end of the input must be seen.
                from tuner.tracking.runs import MlflowRuns

                self._runs = MlflowRuns.open(SweepFolder(self.spool.results), self._uri)
            ended, trouble = self._runs.catch_up(self.spool, self._logged), ""
        # Whatever a store, a server or a full disk raises: the next look begins anew.
        except Exception as error:
            self._runs, ended, trouble = None, False, reason(error, self._uri)
            # Kept in mlflow.log, which the tuner has made this process's stderr.
            sys.stderr.write(traceback.format_exc().replace(self._uri, without_password(self._uri)))
        self._answer([], trouble)
        return ended, trouble

    def _logged(self, entry: Entry) -> None:
        known = (entry.row.number, entry.record)
        if known not in self._answered:
            self._answered.add(known)
            self._answer([entry.row.number], None)

    def _answer(self, logged: list[int], trouble: str | None) -> None:
        self._answers.write(json.dumps({"logged": logged, "trouble": trouble}) + "\n")
        self._answers.flush()


def _listen(news: "SimpleQueue[str]") -> None:
    for line in sys.stdin:
        news.put(line)
    # The tuner is gone. What is half written now is replaced by whoever logs next.
    os._exit(1)


def _await(news: "SimpleQueue[str]", spool: Spool, retry_s: float | None) -> None:
    """Wait for news; after a failure for the time to try again, or for the sweep's end, whose owner waits."""
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
    """Follow the sweep in the folder named by the first argument until its end is in MLflow."""
    os.nice(10)  # the trials that are measured meanwhile come first
    news: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(news,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    follower = Follower(Path(sys.argv[1]), os.environ["MLFLOW_TRACKING_URI"], answers)
    retry_s = FIRST_RETRY_S
    while True:
        is_last = follower.spool.end() is not None
        ended, trouble = follower.look()
        if ended:
            return
        if is_last and trouble:
            sys.exit(GAVE_UP)
        _await(news, follower.spool, retry_s if trouble else None)
        retry_s = min(2 * retry_s, LAST_RETRY_S) if trouble else FIRST_RETRY_S


if __name__ == "__main__":
    main()
