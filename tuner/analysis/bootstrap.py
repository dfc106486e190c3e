"""Pools the step times of layouts that ran several times, and estimates their errors by a bootstrap.

The bootstrap resamples runs and steps. Three runs of a layout say little about how much runs differ. So a run's
deviation is drawn from the deviations of all runs of all layouts, each from the mean of its own layout (residual
bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 9). In addition, the steps of each run
are drawn with replacement.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tuner.core.columns import Floats

BOOTSTRAP_DRAWS: Final = 2000
"""The number of bootstrap draws per layout. Assumed: 50 draws then lie below the 2.5% quantile."""


def pooled_log_times(
    layouts: Sequence[Sequence[Sequence[float]]], draws: int = BOOTSTRAP_DRAWS
) -> tuple[Floats, Floats]:
    """Return the logarithm of each layout's pooled step time, and bootstrap draws of the error of that logarithm.

    Args:
        layouts: the times of the timed steps in ms: for each layout, for each of its runs, the times of the run's
            steps. No run is empty.
        draws: the number of bootstrap draws per layout.

    Returns:
        The logarithms, of shape [layouts], and the draws of their errors, of shape [layouts, draws]. The pooled step
        time is the median over the layout's runs of the median over a run's steps.
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
    """Return the deviation of each run's logarithm from the mean of its layout, for layouts with several runs.

    The deviations of n runs from their own mean are too small by the factor sqrt(n / (n - 1)), so they are widened by
    it. They are also widened by the ratio of the 97.5% quantiles of Student's t and of the normal distribution, since
    the spread is estimated from few deviations. Without any layout with several runs, the result is [0].
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
    """Return the logarithm of the median of a run's steps for each draw of steps with replacement; shape [draws]."""
    steps = np.asarray(steps_ms, dtype=np.float64)
    drawn = random.integers(len(steps), size=(draws, len(steps)))
    log_medians: Floats = np.log(np.median(steps[drawn], axis=1))
    return log_medians
