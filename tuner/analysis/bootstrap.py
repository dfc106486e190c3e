"""The step times of layouts that ran several times, pooled, with bootstrap draws of their errors. Pure.

The bootstrap resamples runs and steps. Three runs of a layout say little about how much runs differ, so runs are drawn
from the deviations of all layouts' runs from the mean of their own layout (residual bootstrap: Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 9). The steps within each run are drawn with replacement in addition.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tuner.core.columns import Floats

BOOTSTRAP_DRAWS: Final = 2000
"""Bootstrap draws per layout. Assumed: the 2.5% quantile then rests on 50 draws."""


def pooled_log_times(
    layouts: Sequence[Sequence[Sequence[float]]], draws: int = BOOTSTRAP_DRAWS
) -> tuple[Floats, Floats]:
    """Return the pooled step time of each layout, and draws of its error.

    Args:
        layouts: the timed steps in ms, nested as layouts, runs of a layout, and steps of a run; no run is empty.
        draws: bootstrap draws per layout.

    Returns:
        The logarithm of each layout's step time in ms (the median over its runs of the median over their steps), of
        shape [layouts], and bootstrap draws of the error of that logarithm, of shape [layouts, draws].
    """
    random = np.random.default_rng(0)
    log_medians = [np.log([np.median(steps) for steps in runs]) for runs in layouts]
    between_runs = _deviations_between_runs(log_medians)
    errors = []
    for runs, logs in zip(layouts, log_medians, strict=True):
        within_runs = (
            np.array([_resampled_log_medians(steps, draws, random) for steps in runs]) - logs[:, None]
        )
        drawn_run = random.integers(len(runs), size=(len(runs), draws))
        drawn_errors = random.choice(between_runs, size=(len(runs), draws))
        drawn_errors += np.take_along_axis(within_runs, drawn_run, axis=0)
        errors.append(np.median(drawn_errors, axis=0))
    return np.array([np.median(logs) for logs in log_medians]), np.array(errors)


def _deviations_between_runs(log_medians: Sequence[Floats]) -> Floats:
    """Return the deviations of all runs from the mean of their layout, widened because there are few of them.

    The deviations of n runs are too small by a factor of sqrt(n / (n - 1)). A spread that is
    estimated from few deviations is widened further by the ratio of Student's quantile to the normal one.
    """
    repeated = [logs for logs in log_medians if len(logs) > 1]
    if not repeated:
        return np.zeros(1)
    from scipy.special import ndtri, stdtrit  # type: ignore[import-untyped]

    freedom = sum(len(logs) - 1 for logs in repeated)
    widening = float(stdtrit(freedom, 0.975) / ndtri(0.975))
    return np.concatenate(
        [widening * (logs - logs.mean()) * np.sqrt(len(logs) / (len(logs) - 1)) for logs in repeated]
    )


def _resampled_log_medians(steps_ms: Sequence[float], draws: int, random: np.random.Generator) -> Floats:
    """Return the logarithms of the medians of steps drawn with replacement, of shape [draws]."""
    steps = np.asarray(steps_ms, dtype=np.float64)
    drawn = random.integers(len(steps), size=(draws, len(steps)))
    log_medians: Floats = np.log(np.median(steps[drawn], axis=1))
    return log_medians
