"""Replaces lower bounds by normal measurements that say as much as "each value is larger than its bound".

Such a measurement is a site of expectation propagation (Minka 2001, "Expectation propagation for approximate Bayesian
inference"): given the measurement, each value has the mean and the variance of its distribution cut off at the bound.
"""

from typing import Final

import numpy as np
from scipy.special import log_ndtr  # type: ignore[import-untyped]

from tuner.core.columns import Floats

ROUNDS: Final = 50
"""Largest number of rounds of expectation propagation. Assumed: about five are enough, except for bounds far above the
expected value."""


def bound_sites(mean: Floats, covariance: Floats, bounds: Floats) -> tuple[Floats, Floats]:
    """Return normal measurements that replace the bounds: their values and their variances, each of shape [values].

    Args:
        mean: the expected values without the bounds, of shape [values].
        covariance: the covariance of the values without the bounds, of shape [values, values].
        bounds: the lower bound of each value, of shape [values].
    """
    precision = np.linalg.inv(covariance)
    # Natural parameters of the sites: 1 / variance, and value / variance.
    site_precision, site_shift = np.full(len(mean), 1e-9), np.zeros(len(mean))
    for _ in range(ROUNDS):
        posterior = np.linalg.inv(precision + np.diag(site_precision))
        centre = posterior @ (precision @ mean + site_shift)
        variance = np.diag(posterior)
        cavity_variance = 1 / np.maximum(1 / variance - site_precision, 1e-9)
        cavity_mean = cavity_variance * (centre / variance - site_shift)
        tilted_mean, tilted_variance = _truncated(cavity_mean, cavity_variance, bounds)
        new_precision = np.maximum(1 / tilted_variance - 1 / cavity_variance, 1e-9)
        new_shift = tilted_mean / tilted_variance - cavity_mean / cavity_variance
        change = np.abs(new_precision - site_precision).max() / (1 + site_precision.max())
        # All sites change at once and influence each other, so each takes only half of its step.
        site_precision, site_shift = (site_precision + new_precision) / 2, (site_shift + new_shift) / 2
        if change < 1e-4:
            break
    return site_shift / site_precision, 1 / site_precision


def _truncated(mean: Floats, variance: Floats, bounds: Floats) -> tuple[Floats, Floats]:
    """Return the means and the variances of normal values, given that they are larger than their bounds."""
    deviation = np.sqrt(variance)
    z = (bounds - mean) / deviation
    hazard = np.exp(-(z**2) / 2 - np.log(2 * np.pi) / 2 - log_ndtr(-z))
    narrowing = np.clip(hazard * (hazard - z), 1e-9, 1 - 1e-6)
    return mean + deviation * hazard, variance * (1 - narrowing)
