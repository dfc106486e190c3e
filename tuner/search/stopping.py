"""How near the best measured layout is to the best of all, as far as the surrogate knows.

The best of the rows left is drawn from their joint posterior, those that would not fit left out of a draw: the
share of draws in which it does not beat the measured best by more than y is the probability of being within y.
What was measured counts as it was measured: a disturbed trial that hides the best is not foreseen.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS: Final = 1000
MIN_MEASURED: Final = 5
"""Measurements from which a sweep may stop by itself: of fewer, the prior alone says how far the predictor errs, and
one disturbed trial may say anything."""
NOTHING: Final = 0.0005
"""A gain that is shown as none."""


@dataclass(frozen=True, slots=True)
class Certainty:
    """Draws of how much slower the best measured row is than the best of all."""

    losses: Floats
    """Sorted: best measured / best of all - 1, at least 0, one a draw."""
    measured: int
    """Measurements that they rest on."""
    of: str = "the space"
    """What `all` is: the rows left were of this."""

    def within(self, gain: float) -> float:
        """The probability that nothing left is worth more than `gain`, a share of the best's step time."""
        return float(np.searchsorted(self.losses, gain, side="right") / len(self.losses))

    def suffices(self, gain: float, confidence: float) -> bool:
        """Whether a sweep may stop: nothing left is worth more than `gain`, with this probability at least."""
        return self.measured >= MIN_MEASURED and self.within(gain) >= confidence

    def gain(self, confidence: float) -> float:
        """The smallest gain that what is left does not exceed, with this probability."""
        return float(np.quantile(self.losses, confidence, method="inverted_cdf"))

    def sentence(self, confidence: float) -> str:
        """What a user may believe."""
        gain = self.gain(confidence)
        near = f"within {gain:.1%} of the best" if gain >= NOTHING else "the best"
        return f"The best is {near} of {self.of} with probability {confidence:.0%}, as far as the surrogate knows."


def certainty(
    best_log_ms: float, left_log_ms: Floats, fits: Floats, measured: int, random: np.random.Generator
) -> Certainty:
    """What draws of the rows left say of the best measured one.

    Args:
        best_log_ms: Logarithm of the best measured step time.
        left_log_ms: Joint draws of the same of the rows left, shape [draws, rows].
        fits: The probability that each of them fits.
        measured: Measurements that the draws rest on.
        random: Draws which rows fit.
    """
    fitting = random.random(left_log_ms.shape) < fits
    best_left = np.where(fitting, left_log_ms, np.inf).min(axis=1, initial=np.inf)
    losses = np.expm1(np.maximum(0.0, best_log_ms - best_left))
    return Certainty(np.sort(losses), measured)
