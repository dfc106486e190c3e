"""When a running trial passes one of its limits."""

from dataclasses import dataclass, field
from typing import Literal

from tuner.trial.contract import Heartbeat, Limits, Phase

Ending = Literal["stop", "startup", "step", "trial"]
"""Why a launcher ended a job itself: it was told to, or the limit of that name was passed."""


SILENT_STEPS = 20
"""How many times its slowest step so far a job may be silent."""


LEAST_SILENCE_S = 30.0
"""What a job may always be silent, however quick its steps: a checkpoint, a collection, a late compilation."""


_STEPS_TO_JUDGE = 3
"""How many steps after the first must be seen before their times say how long silence may last."""


@dataclass(slots=True)
class Clock:
    """Tells when a trial passes one of its limits, from the heartbeats seen. Times are monotonic seconds."""

    limits: Limits
    started_s: float
    heartbeat: Heartbeat | None = None
    _beat_s: float = field(default=0.0, init=False)
    _warm: tuple[int, float] | None = field(default=None, init=False)
    """The first step that was seen finished, and when."""
    _stepped_s: float = field(default=0.0, init=False)
    """When a step was last seen finished."""
    _slowest_s: float = field(default=0.0, init=False)
    """The longest time between two such moments: no step after the first took longer."""

    def beat(self, heartbeat: Heartbeat, now_s: float) -> bool:
        """Take a heartbeat in; return whether it is a new one.

        Its age counts from when it was seen: the clocks of two nodes need not agree.
        """
        if heartbeat == self.heartbeat:
            return False
        step = self.heartbeat.step if self.heartbeat else 0
        self.heartbeat, self._beat_s = heartbeat, now_s
        if heartbeat.step > step:
            if self._warm is None:
                self._warm = heartbeat.step, now_s
            else:
                self._slowest_s = max(self._slowest_s, now_s - self._stepped_s)
            self._stepped_s = now_s
        return True

    @property
    def phase(self) -> Phase:
        """Where the trial was last seen."""
        return self.heartbeat.phase if self.heartbeat else "startup"

    @property
    def silence_s(self) -> float:
        """How long the job may be silent after its first step: less than the limit once its steps are known."""
        if self._warm is None or self.heartbeat is None:
            return self.limits.step_s
        if self.heartbeat.step - self._warm[0] < _STEPS_TO_JUDGE:
            return self.limits.step_s
        return min(self.limits.step_s, max(LEAST_SILENCE_S, SILENT_STEPS * self._slowest_s))

    def slower_than_ms(self, now_s: float) -> float | None:
        """A lower bound of the mean step time: the steps since the first, and the one under way, took no less."""
        if self._warm is None or self.heartbeat is None:
            return None
        step, since_s = self._warm
        return max(now_s - since_s, 0.0) / (self.heartbeat.step - step + 1) * 1000 or None

    def passed(self, now_s: float) -> Ending | None:
        """The limit that is passed, if any."""
        if now_s - self.started_s > self.limits.trial_s:
            return "trial"
        if self.heartbeat is None or self.heartbeat.step < 1:
            return "startup" if now_s - self.started_s > self.limits.startup_s else None
        return "step" if now_s - self._beat_s > self.silence_s else None
