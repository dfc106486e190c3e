"""When enough steps are timed, and how sure the median is. Pure functions."""

from collections.abc import Sequence

import numpy as np

from tuner.trial import Measurement

_RESAMPLES = 1000
_CONFIDENCE = 0.95


def median_interval(times_ms: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the median and the ends of its bootstrap 95% interval.

    Percentile method (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The same times
    and seed give the same interval on every rank.

    Raises:
        ValueError: if there are no times.
    """
    if not times_ms:
        raise ValueError("no step was timed, so there is no median")
    times = np.asarray(times_ms, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(times), size=(_RESAMPLES, len(times)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.median(times[drawn], axis=1), [tail, 1 - tail])
    return float(np.median(times)), float(low), float(high)


def measured_enough(times_ms: Sequence[float], measurement: Measurement) -> bool:
    """Whether to stop: at `max_steps`, or from `min_steps` on once the interval is as narrow as asked for."""
    if len(times_ms) >= measurement.max_steps:
        return True
    if len(times_ms) < measurement.min_steps:
        return False
    median, low, high = median_interval(times_ms)
    return max(median - low, high - median) <= measurement.target_relative_interval * median
