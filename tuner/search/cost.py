"""How long the next trial is expected to take: a fixed part, and a part for each of its steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from tuner.core.columns import Floats
from tuner.search.observation import Observation
from tuner.trial.contract import Measurement


@dataclass(frozen=True, slots=True)
class TrialCost:
    """The expected duration of a trial as a function of its step time."""

    fixed_s: float = 0.0
    """Seconds for start-up, build and teardown."""
    steps: float = 1.0
    """Number of steps, warm-up included."""

    def seconds(self, step_time_ms: Floats) -> Floats:
        """Return how many seconds trials with these step times take."""
        return self.fixed_s + self.steps * step_time_ms / 1e3


def trial_cost(observations: Iterable[Observation], measurement: Measurement) -> TrialCost:
    """Return the median cost of the completed trials.

    Before the first completed trial, it is the cost of the steps of the shortest possible trial.
    """
    fewest_steps = measurement.warmup_steps + measurement.min_steps
    completed = [observation for observation in observations if observation.step_time_ms is not None]
    if not completed:
        return TrialCost(steps=fewest_steps)
    return TrialCost(
        fixed_s=max(0.0, median(observation.fixed_s for observation in completed)),
        steps=max(fewest_steps, median(observation.steps for observation in completed)),
    )
