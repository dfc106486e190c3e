"""What a trial costs: what every one takes, and its steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tuner.search.observation import Observation
from tuner.trial.contract import Measurement


@dataclass(frozen=True, slots=True)
class TrialCost:
    """What the next trial takes beside, and in, its steps."""

    fixed_s: float = 0.0
    """Start-up, build and the end."""
    steps: float = 1.0
    """Warm-up included."""

    def seconds(self, step_time_ms: NDArray[np.float64]) -> NDArray[np.float64]:
        """What trials of these step times take."""
        return self.fixed_s + self.steps * step_time_ms / 1e3


def trial_cost(observations: Iterable[Observation], measurement: Measurement) -> TrialCost:
    """The median of the completed trials; before the first, nothing but the steps of the shortest trial there is."""
    least = measurement.warmup_steps + measurement.min_steps
    completed = [observation for observation in observations if observation.step_time_ms is not None]
    if not completed:
        return TrialCost(steps=least)
    return TrialCost(
        fixed_s=max(0.0, median(observation.fixed_s for observation in completed)),
        steps=max(least, median(observation.steps for observation in completed)),
    )
