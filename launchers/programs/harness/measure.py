"""When enough steps are timed, which of them count, and how sure their median is. Pure functions.

The times are those of the slowest rank, which every rank knows, so that all of them decide the same.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.trial.contract import Measurement, TrialSpec

_RESAMPLES = 1000
_CONFIDENCE = 0.95

_NORMAL_QUARTILE = 0.6745
"""Of the standard normal distribution: makes a median of deviations a standard deviation."""
_WARMUP_DEVIATIONS = 4.0
"""How far above the later steps a step is still warm-up: steady noise loses a step in 1 of 100 trials where it is
normal, in 3 of 100 where it is skewed (the simulation in tests/unit/launchers/test_measure.py)."""
_OUTLIER_DEVIATIONS = 3.5
"""Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993."""
_LEAST_STEPS_TO_JUDGE = 3
"""Fewer have no spread to speak of."""


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


def warmup_end(times_ms: Sequence[float], tolerance: float) -> int:
    """Return how many of the first steps are still warm-up: at most half of them.

    They are the leading steps that lie above the median of the second half, by 4 standard deviations of the noise and
    by `tolerance`, a share of it: less does not matter. The noise is judged by the differences of
    neighbours (the median of their absolutes), which a falling level or a few outliers hardly change; so a single slow
    step is warm-up only if it is the first. MSER (White 1997), which cuts where the mean of the rest is surest, cuts
    4 of 10 steady sequences of 5 to 20 steps.
    """
    times = np.asarray(times_ms, dtype=np.float64)
    half = len(times) // 2
    if not half:
        return 0
    level = float(np.median(times[half:]))
    deviation = float(np.median(np.abs(np.diff(times)))) / (_NORMAL_QUARTILE * np.sqrt(2))
    steady = times[:half] <= level + max(_WARMUP_DEVIATIONS * deviation, tolerance * level)
    return int(steady.argmax()) if steady.any() else half


def outliers(times_ms: Sequence[float], tolerance: float) -> tuple[int, ...]:
    """Return the places of the steps far from the median: 3.5 deviations, judged by the median one, and `tolerance`."""
    times: NDArray[np.float64] = np.asarray(times_ms, dtype=np.float64)
    if len(times) < _LEAST_STEPS_TO_JUDGE:
        return ()
    median = float(np.median(times))
    distance = np.abs(times - median)
    deviation = float(np.median(distance)) / _NORMAL_QUARTILE
    return tuple(np.flatnonzero(distance > max(_OUTLIER_DEVIATIONS * deviation, tolerance * median)).tolist())


def measured_enough(times_ms: Sequence[float], measurement: Measurement) -> bool:
    """Whether to stop, by the times of all steps behind the least warm-up.

    The steps that are found to be warm-up do not count: at least `min_steps` must be left. From there on the trial
    ends once their interval is as narrow as asked for, or `max_steps` were done, warm-up among them.
    """
    tolerance = measurement.target_relative_interval
    timed = times_ms[warmup_end(times_ms, tolerance) :]
    if len(timed) < measurement.min_steps:
        return False
    if len(times_ms) >= measurement.max_steps:
        return True
    median, low, high = median_interval(timed)
    return max(median - low, high - median) <= tolerance * median


def lower_bound_ms(times_ms: Sequence[float], measurement: Measurement) -> float | None:
    """Return what the median will hardly be below, by the times behind the least warm-up; None where none can tell.

    It is below the median twice as far as the interval's lower end: that one is made to be read once, and read after
    every step it lies above the true median in 2 of 10 trials, this one in 6 of 100. It takes 3 steps, and
    a step that is the fastest so far tells of nothing but a trial that still warms up.
    """
    timed = times_ms[warmup_end(times_ms, measurement.target_relative_interval) :]
    if len(timed) < _LEAST_STEPS_TO_JUDGE or times_ms[-1] < min(times_ms[:-1]):
        return None
    median, low, _ = median_interval(timed)
    bound = 2 * low - median
    return bound if bound > 0 else None


def slower_than_ms(times_ms: Sequence[float], spec: TrialSpec) -> float | None:
    """Return what the median will hardly be below, where that is enough to give the trial up; None otherwise."""
    if spec.give_up_above_ms is None:
        return None
    bound_ms = lower_bound_ms(times_ms, spec.measurement)
    return bound_ms if bound_ms is not None and bound_ms > spec.give_up_above_ms else None
