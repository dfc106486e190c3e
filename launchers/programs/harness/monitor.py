"""Tracks the progress of a rank: its phase and step, the time spent in each phase, and rank 0's heartbeat file."""

import json
import time

from tuner.files import to_data
from tuner.trial.contract import Durations, Heartbeat, Phase, TrialFolder


class Monitor:
    """The phase, the step and the clock of one rank. Rank 0 also writes phase and step to the heartbeat file.

    Args:
        folder: The trial's folder.
        rank: This rank's number.
        started_at: When the launcher started the trial, in seconds since the epoch.
    """

    def __init__(self, folder: TrialFolder, rank: int, started_at: float) -> None:
        self.folder, self.rank, self.started_at = folder, rank, started_at
        self.phase: Phase = "startup"
        """The current phase of the trial or, within a step, the current part of the step."""
        self.step = 0
        """Number of finished optimizer steps."""
        self._trial_phase: Phase = "startup"
        """The current phase of the trial, never a part of a step."""
        self._entered_at = started_at
        self._spent_s: dict[Phase, float] = {}
        self._beat()

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the trial."""
        self._account()
        self.phase = self._trial_phase = phase
        self._beat()

    def enter_part(self, phase: Phase) -> None:
        """Begin a part of a step; no heartbeat is written, since there are too many parts."""
        self.phase = phase

    def finish_step(self) -> None:
        """Count a finished optimizer step, and return to the phase of the trial."""
        self.step += 1
        self.phase = self._trial_phase
        self._beat()

    def durations(self) -> Durations:
        """Return the time spent in each phase up to now, in seconds."""
        self._account()
        spent_s = self._spent_s
        return Durations(
            startup_s=spent_s.get("startup", 0.0),
            build_s=spent_s.get("build", 0.0),
            warmup_s=spent_s.get("warmup", 0.0) + spent_s.get("memory", 0.0),
            measure_s=spent_s.get("measure", 0.0),
            total_s=self._entered_at - self.started_at,
        )

    def _account(self) -> None:
        """Add the time since the last call to the time spent in the trial's current phase."""
        now = time.time()
        self._spent_s[self._trial_phase] = self._spent_s.get(self._trial_phase, 0.0) + now - self._entered_at
        self._entered_at = now

    def _beat(self) -> None:
        if self.rank:
            return
        path = self.folder.heartbeat
        temporary = path.with_name(".heartbeat.tmp")
        data = to_data(Heartbeat(phase=self.phase, step=self.step, time_s=time.time()))
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(path)  # without fsync: if the machine crashes, its last heartbeat does not matter
