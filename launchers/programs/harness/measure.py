"""Decides when enough steps are timed, which of them count, and how certain their median is.

All functions are pure. The times of a step are those of its slowest rank. Every rank knows these times, so all ranks
decide the same.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.trial.contract import Measurement, TrialSpec

_RESAMPLES = 1000
"""Number of bootstrap samples from which an interval is computed. Assumed: the ends of the interval then vary
little."""
_CONFIDENCE = 0.95

_NORMAL_QUARTILE = 0.6745
"""The upper quartile of the standard normal distribution: a median of absolute deviations divided by it estimates the
standard deviation."""
_WARMUP_DEVIATIONS = 4.0
"""A step that takes this many standard deviations longer than the later steps is warm-up. Measured: in trials whose
step times are steady, a step is mistaken for warm-up in 1 of 100 trials if the noise is normal, and in 3 of 100 if it
is skewed (the simulation in tests/unit/launchers/programs/test_measure.py)."""
_OUTLIER_DEVIATIONS = 3.5
"""A step whose time differs from the median by more standard deviations than this is an outlier. Published: Iglewicz
and Hoaglin, How to Detect and Handle Outliers, 1993."""
_LEAST_STEPS_TO_JUDGE = 3
"""The fewest steps whose spread is judged. Assumed: the spread of fewer steps means little."""


def median_interval(times_ms: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the median of `times_ms` and the lower and the upper end of its bootstrap 95% interval, all in ms.

    It uses the percentile method (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Equal times
    and an equal random seed `seed` give the same interval on every rank.

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
    """Return how many of the first steps are still warm-up; never more than half of all steps.

    A step is warm-up if it and every step before it lie above the median of the second half of the steps by 4 standard
    deviations of the noise, and also by `tolerance`, a share of that median below which a difference does not matter.
    The noise is estimated from the median absolute difference of neighbouring steps, which a falling level or a few
    outliers hardly change; so a single slow step is warm-up only if it is the first. MSER (White 1997), which cuts
    where the mean of the remaining steps is most certain, was tried and cuts 4 of 10 steady sequences of 5 to 20 steps.
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
    """Return the indices of the outliers: the steps whose times are far from the median.

    They differ from it by more than 3.5 standard deviations, estimated from the median absolute deviation, and by more
    than `tolerance`, a share of the median.
    """
    times: NDArray[np.float64] = np.asarray(times_ms, dtype=np.float64)
    if len(times) < _LEAST_STEPS_TO_JUDGE:
        return ()
    median = float(np.median(times))
    distance = np.abs(times - median)
    deviation = float(np.median(distance)) / _NORMAL_QUARTILE
    return tuple(np.flatnonzero(distance > max(_OUTLIER_DEVIATIONS * deviation, tolerance * median)).tolist())


def measured_enough(times_ms: Sequence[float], measurement: Measurement) -> bool:
    """Return whether a trial has timed enough steps, so that it can end.

    `times_ms` are the times of all steps after the first `warmup_steps` steps. The first of them may still be warm-up
    (`warmup_end`) and do not count; at least `min_steps` must remain. The trial can end once the 95% interval of the
    remaining steps' median is as narrow as `target_relative_interval` asks, or once `max_steps` steps are done,
    including further warm-up.
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
    """Return a lower bound of the median step time in ms, which the true median is hardly ever below.

    `times_ms` are the times of all steps after the first `warmup_steps` steps. The bound lies twice as far below their
    median as the lower end of its 95% interval. The interval is valid for a single look. With a look after every step,
    its lower end lies above the true median in 2 of 10 trials, and the bound in 6 of 100 (the simulation in
    tests/unit/launchers/programs/test_measure.py).

    Returns:
        The bound. It is None with fewer than 3 steps, or if the last step is the fastest so far, since the trial may
            then still be warming up.
    """
    timed = times_ms[warmup_end(times_ms, measurement.target_relative_interval) :]
    if len(timed) < _LEAST_STEPS_TO_JUDGE or times_ms[-1] < min(times_ms[:-1]):
        return None
    median, low, _ = median_interval(timed)
    bound = 2 * low - median
    return bound if bound > 0 else None


def slower_than_ms(times_ms: Sequence[float], spec: TrialSpec) -> float | None:
    """Return a lower bound of the trial's step time in ms if it exceeds `spec.give_up_above_ms`, otherwise None.

    If it does, the trial can be given up. `times_ms` are the times of all steps after the first `warmup_steps` steps.
    """
    if spec.give_up_above_ms is None:
        return None
    bound_ms = lower_bound_ms(times_ms, spec.measurement)
    return bound_ms if bound_ms is not None and bound_ms > spec.give_up_above_ms else None
