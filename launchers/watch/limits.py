"""Tells when a running trial exceeds one of its time limits."""

from dataclasses import dataclass, field
from typing import Literal

from tuner.trial.contract import Heartbeat, Limits, Phase

Ending = Literal["stop", "startup", "step", "trial"]
"""Why a launcher ended a job: it was asked to stop the job, or the job exceeded the startup, step or trial limit."""

SILENT_STEPS = 20
"""A job may go without a heartbeat for this many times its slowest step so far. Assumed: the step times of a healthy
job never differ so much."""

LEAST_SILENCE_S = 30.0
"""A job may always go without a heartbeat for this many seconds, however quick its steps are. Assumed: longer than a
checkpoint, a garbage collection or a late compilation takes."""

_STEPS_TO_JUDGE = 3
"""How many steps after the first must be seen before their times limit how long a job may go without a heartbeat.
Assumed: an early step may still compile an expert that no token reached before."""


@dataclass(slots=True)
class LimitWatch:
    """Tells from a trial's heartbeats when it exceeds one of its limits. Times are seconds of a monotonic clock."""

    limits: Limits
    started_s: float
    heartbeat: Heartbeat | None = None
    """The newest heartbeat."""
    _beat_s: float = field(default=0.0, init=False)
    """The time at which the newest heartbeat was seen; 0 before the first."""
    _first_step: tuple[int, float] | None = field(default=None, init=False)
    """The number of the first step that was seen to be finished, and the time at which it was seen."""
    _stepped_s: float = field(default=0.0, init=False)
    """The time at which a step was last seen to be finished; 0 before the first."""
    _slowest_s: float = field(default=0.0, init=False)
    """The longest time between two finished steps that were seen: no step after the first took longer."""

    def beat(self, heartbeat: Heartbeat, now_s: float) -> bool:
        """Record a heartbeat that was seen at the time `now_s`; return whether it is a new one.

        The age of a heartbeat counts from when it was seen, since the clocks of two nodes may differ.
        """
        if heartbeat == self.heartbeat:
            return False
        last_step = self.heartbeat.step if self.heartbeat else 0
        self.heartbeat, self._beat_s = heartbeat, now_s
        if heartbeat.step > last_step:
            if self._first_step is None:
                self._first_step = heartbeat.step, now_s
            else:
                self._slowest_s = max(self._slowest_s, now_s - self._stepped_s)
            self._stepped_s = now_s
        return True

    @property
    def phase(self) -> Phase:
        """Return the phase in the newest heartbeat, or `startup` before the first."""
        return self.heartbeat.phase if self.heartbeat else "startup"

    @property
    def silence_s(self) -> float:
        """Return how long, in seconds, the job may go without a heartbeat after its first step.

        This is `limits.step_s`, or less once the times of its steps are known.
        """
        if self._first_step is None or self.heartbeat is None:
            return self.limits.step_s
        if self.heartbeat.step - self._first_step[0] < _STEPS_TO_JUDGE:
            return self.limits.step_s
        return min(self.limits.step_s, max(LEAST_SILENCE_S, SILENT_STEPS * self._slowest_s))

    def slower_than_ms(self, now_s: float) -> float | None:
        """Return a lower bound of the mean step time in ms; None before the first step has ended.

        It is the time since the first step ended, divided by the number of steps that were finished since then or are
        under way.
        """
        if self._first_step is None or self.heartbeat is None:
            return None
        step, since_s = self._first_step
        return max(now_s - since_s, 0.0) / (self.heartbeat.step - step + 1) * 1000 or None

    def passed(self, now_s: float) -> Ending | None:
        """Return the limit that the trial exceeds at the time `now_s`, or None."""
        if now_s - self.started_s > self.limits.trial_s:
            return "trial"
        if self.heartbeat is None or self.heartbeat.step < 1:
            return "startup" if now_s - self.started_s > self.limits.startup_s else None
        return "step" if now_s - self._beat_s > self.silence_s else None
