"""Watches a running job from its folder: its heartbeats, its limits, and the size of its output."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launchers.processes import RunningJob
from launchers.watch import logs
from launchers.watch.limits import Ending, LimitWatch
from tuner.errors import InputError
from tuner.files import read_json
from tuner.trial.contract import Heartbeat, TrialFolder

_POLL_S = 0.1
"""The time between two looks at a job, in seconds. Assumed: shorter than any step that deserves a heartbeat, and far
longer than one look takes."""
_LOG_LIMIT_BYTES = 64 << 20
"""The size above which a job's output is cut. Assumed: more than a job of many ranks writes in a trial, and little on
the smallest disk in use."""


@dataclass(slots=True)
class JobWatcher:
    """Watches one running job."""

    folder: TrialFolder
    limits: LimitWatch
    on_heartbeat: Callable[[Heartbeat], None] | None
    _cut_tails: dict[Path, bytes] = field(default_factory=dict, init=False)
    """For each output file that was cut because it was too large: the tail that it had when it was last cut."""

    def until_end(self, job: RunningJob, stop: threading.Event) -> Ending | None:
        """Block until the job ends by itself, or there is a reason to end it; return this reason, or else None."""
        while not job.ended():
            self._take_heartbeat()
            if ending := self.limits.passed(time.monotonic()):
                return ending
            self._bound_logs()
            if stop.wait(_POLL_S):
                return "stop"
        self._take_heartbeat()
        return None

    def close_gaps(self) -> None:
        """Rewrite each output file that was cut as its head and its newest output, without the hole that cutting left.

        Call it once no process writes the files. Files that have become too large by then are cut first.
        """
        self._bound_logs()
        for path, earlier_tail in self._cut_tails.items():
            logs.close_gap(path, earlier_tail)

    def _take_heartbeat(self) -> None:
        with suppress(InputError):
            heartbeat = read_json(Heartbeat, self.folder.heartbeat)
            if self.limits.beat(heartbeat, time.monotonic()) and self.on_heartbeat:
                self.on_heartbeat(heartbeat)

    def _bound_logs(self) -> None:
        self._cut_tails.update(logs.bound(self.folder.log, _LOG_LIMIT_BYTES))
