"""How near the best measured layout is to the best of all, as far as the surrogate knows.

The step times of the rows that are left are drawn jointly from the surrogate's posterior; in each draw, rows that would
not fit the GPU's memory are left out. The share of draws in which no row left beats the measured best by more than y
is the probability that the measured best is within y of the best of all. Measurements count as they were measured: a
disturbed trial that hides the best layout is not foreseen.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from tuner.core.columns import Floats

JOINT_DRAWS: Final = 1000
"""Joint draws of the rows that are left. Assumed: a probability of 95% is then uncertain by 0.7%."""
MIN_MEASURED: Final = 5
"""Fewest measurements after which a sweep may stop by itself. Assumed: with fewer, only the prior says how far the
predictor errs, and one disturbed trial can mislead it."""
NEGLIGIBLE_GAIN: Final = 0.0005
"""Gains below this share of the step time are shown as none. Assumed: they would print as 0.0%."""


@dataclass(frozen=True, slots=True)
class Certainty:
    """Draws of how much slower the best measured row is than the best of all rows."""

    losses: Floats
    """The draws of best measured / best of all - 1, each at least 0, sorted, of shape [draws]."""
    measured: int
    """The number of measurements that the draws rest on."""
    searched: str = "the space"
    """What "all rows" are: the space, the grid, or the grid and its refinement."""

    def within(self, gain: float) -> float:
        """Return the probability that no row left beats the best by more than the share `gain` of the row's time."""
        return float(np.searchsorted(self.losses, gain, side="right") / len(self.losses))

    def suffices(self, gain: float, confidence: float) -> bool:
        """Return whether a sweep may stop: with probability `confidence`, no row left gains more than `gain`."""
        return self.measured >= MIN_MEASURED and self.within(gain) >= confidence

    def gain(self, confidence: float) -> float:
        """Return the smallest gain that no row left exceeds, with at least the probability `confidence`."""
        return float(np.quantile(self.losses, confidence, method="inverted_cdf"))

    def sentence(self, confidence: float) -> str:
        """Return a sentence that tells a user how near the best is, with the probability `confidence`."""
        gain = self.gain(confidence)
        near = f"within {gain:.1%} of the best" if gain >= NEGLIGIBLE_GAIN else "the best"
        probability = f"with probability {confidence:.0%}, as far as the surrogate knows"
        return f"The best is {near} of {self.searched} {probability}."


def certainty(
    best_log_ms: float, left_log_ms: Floats, fits: Floats, *, measured: int, random: np.random.Generator
) -> Certainty:
    """Return what draws of the rows left say about the best measured row.

    Args:
        best_log_ms: the logarithm of the best measured step time in ms.
        left_log_ms: joint draws of the logarithms of the step times of the rows left, of shape [draws, rows].
        fits: the probability that each of these rows fits the GPU's memory, of shape [rows].
        measured: the number of measurements that the draws rest on.
        random: draws which rows fit.
    """
    fitting = random.random(left_log_ms.shape) < fits
    best_left = np.where(fitting, left_log_ms, np.inf).min(axis=1, initial=np.inf)
    losses = np.expm1(np.maximum(0.0, best_log_ms - best_left))
    return Certainty(np.sort(losses), measured)
