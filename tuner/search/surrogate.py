"""What the measurements say of the predictor's errors: a Student-t process on log(measured / predicted).

The error of a layout is a bias that all layouts of a workload share, a part that close layouts share, and a part of
its own. How large these are is itself learnt: their common variance has an inverse-gamma prior, which makes the
Gaussian process a Student-t process (Shah, Wilson and Ghahramani 2014, "Student-t processes as alternatives to
Gaussian processes"): wide while little is measured. Censored trials enter as the normal sites of expectation
propagation (Minka 2001), with the variance that truncation leaves. Rows in flight enter at their expected value
(the kriging believer: Ginsbourger, Le Riche and Carraro 2010, "Kriging is well-suited to parallelize optimization").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular  # type: ignore[import-untyped]
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]
from scipy.special import log_ndtr  # type: ignore[import-untyped]

Floats = NDArray[np.float64]

ERROR: Final = 0.2
"""Prior deviation of a layout's error beside the bias, as a logarithm: what a predictor may be off by where it was
never held against measurements. On vTrain's groups it is 0.1."""
ERROR_WEIGHT: Final = 2.0
"""Measurements that this prior counts as: its degrees of freedom."""
BIAS: Final = 8.0
"""Deviation of the shared bias, in errors: a factor of e, for a predictor that nothing has calibrated."""
REACH: Final = 4.0
"""Distance, in doublings of a knob, at which the shared part has lost all but 1/e of its correlation."""
OWN: Final = 0.3
"""Deviation of a layout's own part and of repeats, in errors.

Reach, own part and the exponential kernel are where the predictive density of rows not yet measured, given 2, 4
and 8 rows, is greatest over vTrain's recorded groups; there 90% intervals hold 93 to 99% of them, and on the
landscape cpu-4-tiny-gpt, which had no part in the choice, 91 to 93%.
"""

SITE_ROUNDS: Final = 50
"""Of expectation propagation; some five are enough but for bounds far beyond what is expected."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """The errors of some rows: a multivariate Student-t distribution."""

    mean: Floats
    deviation: Floats
    """Scale of each row; wider than it by the degrees of freedom."""
    freedom: float


class Surrogate:
    """The predictor's errors, learnt from the rows that were measured.

    Args:
        features: One row of numbers a layout, shape [rows, columns].
    """

    def __init__(self, features: Floats) -> None:
        self._features = features
        self._rows: list[int] = []
        self._errors: list[float] = []
        self._bounds: dict[int, float] = {}
        self._fits: dict[tuple[int, ...], _Fit] = {}

    @property
    def measured(self) -> int:
        """How many measurements it rests on."""
        return len(self._rows)

    @property
    def informed(self) -> int:
        """The same, with the bounds."""
        return len(self._rows) + len(self._bounds)

    def observe(self, row: int, error: float) -> None:
        """Take in log(measured / predicted) of a row."""
        self._rows.append(row)
        self._errors.append(error)
        self._fits.clear()

    def exceed(self, row: int, bound: float) -> None:
        """Take in that log(measured / predicted) of a row is larger than `bound`."""
        self._bounds[row] = max(bound, self._bounds.get(row, bound))
        self._fits.clear()

    def at(self, rows: NDArray[np.intp], in_flight: Sequence[int] = ()) -> Posterior:
        """The errors of `rows` as they would be measured, given what was, and rows in flight as expected."""
        fit = self._fit(tuple(in_flight))
        mean, _, variance = fit.at(self._features[rows])
        return Posterior(mean, np.sqrt(fit.scale * (variance + OWN**2)), fit.freedom)

    def draw(self, rows: NDArray[np.intp], draws: int, random: np.random.Generator) -> Floats:
        """Joint draws of the errors of `rows`, shape [draws, rows]."""
        fit = self._fit(())
        mean, reduced, _ = fit.at(self._features[rows])
        points = self._features[rows]
        covariance = _between(points, points) - reduced.T @ reduced + OWN**2 * np.eye(len(rows))
        root = cholesky(covariance, lower=True)
        scales = fit.scale * fit.freedom / random.chisquare(fit.freedom, (draws, 1))
        drawn: Floats = mean + np.sqrt(scales) * (random.standard_normal((draws, len(rows))) @ root.T)
        return drawn

    def _fit(self, in_flight: tuple[int, ...]) -> "_Fit":
        if in_flight not in self._fits:
            self._fits[in_flight] = self._refit(in_flight)
        return self._fits[in_flight]

    def _refit(self, in_flight: tuple[int, ...]) -> "_Fit":
        if in_flight:
            fit = self._fit(())
            points = self._features[list(in_flight)]
            return fit.extended(points, fit.at(points)[0], np.full(len(points), OWN**2))
        exact = _Fit.of(self._features[self._rows], np.array(self._errors))
        if not self._bounds:
            return exact
        points = self._features[list(self._bounds)]
        mean, reduced, _ = exact.at(points)
        covariance = _between(points, points) - reduced.T @ reduced + OWN**2 * np.eye(len(points))
        values, variances = _sites(mean, exact.scale * covariance, np.array(list(self._bounds.values())))
        return exact.extended(points, values, OWN**2 + variances / exact.scale)


@dataclass(frozen=True, slots=True)
class _Fit:
    """A process with unit scale, fitted: its points, the root of their covariance, and the learnt scale."""

    points: Floats
    values: Floats
    noise: Floats
    """Variance of each value beside the process."""
    root: Floats
    weights: Floats
    """root^-1 values."""
    scale: float
    """The variance of an error that the exact measurements suggest."""
    freedom: float

    @classmethod
    def of(cls, points: Floats, values: Floats) -> "_Fit":
        """Fit exact measurements."""
        noise = np.full(len(values), OWN**2)
        root, weights = _solved(points, values, noise)
        freedom = ERROR_WEIGHT + len(values)
        scale = (ERROR_WEIGHT * ERROR**2 + float(weights @ weights)) / freedom
        return cls(points, values, noise, root, weights, scale, freedom)

    def extended(self, points: Floats, values: Floats, noise: Floats) -> "_Fit":
        """With values that are not measured: they say nothing of the scale."""
        points, values = np.vstack([self.points, points]), np.concatenate([self.values, values])
        noise = np.concatenate([self.noise, noise])
        return _Fit(points, values, noise, *_solved(points, values, noise), self.scale, self.freedom)

    def at(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """Mean at the points; root^-1 of the covariance with them; and, of unit scale, their variance."""
        if not len(self.values):
            return np.zeros(len(points)), np.zeros((0, len(points))), np.full(len(points), BIAS**2 + 1)
        reduced = solve_triangular(self.root, _between(self.points, points), lower=True, check_finite=False)
        variance = np.maximum(BIAS**2 + 1 - np.einsum("ij,ij->j", reduced, reduced), 0.0)
        return self.weights @ reduced, reduced, variance


def _between(one: Floats, other: Floats) -> Floats:
    """Covariance of the errors of every pair of layouts, in variances of the error."""
    alike = cdist(one, other)
    alike *= -1 / REACH
    np.exp(alike, out=alike)
    alike += BIAS**2
    return np.asarray(alike)


def _solved(points: Floats, values: Floats, noise: Floats) -> tuple[Floats, Floats]:
    """The root of the values' covariance, and root^-1 values."""
    if not len(values):
        return np.zeros((0, 0)), np.zeros(0)
    covariance = _between(points, points)
    covariance[np.diag_indices_from(covariance)] += noise
    root = cholesky(covariance, lower=True, check_finite=False)
    return root, solve_triangular(root, values, lower=True, check_finite=False)


def _sites(mean: Floats, covariance: Floats, bounds: Floats) -> tuple[Floats, Floats]:
    """Normal measurements that say as much as "every value is larger than its bound": values and variances.

    Args:
        mean: Of the values, without the bounds.
        covariance: Of the same.
        bounds: Lower bounds.
    """
    precision = np.linalg.inv(covariance)
    tau, shift = np.full(len(mean), 1e-9), np.zeros(len(mean))
    for _ in range(SITE_ROUNDS):
        posterior = np.linalg.inv(precision + np.diag(tau))
        centre = posterior @ (precision @ mean + shift)
        variance = np.diag(posterior)
        cavity = 1 / np.maximum(1 / variance - tau, 1e-9)
        around = cavity * (centre / variance - shift)
        tilted, narrowed = _truncated(around, cavity, bounds)
        # Damped: the sites' changes meet in the next round.
        new_tau = np.maximum(1 / narrowed - 1 / cavity, 1e-9)
        new_shift = tilted / narrowed - around / cavity
        change = np.abs(new_tau - tau).max() / (1 + tau.max())
        tau, shift = (tau + new_tau) / 2, (shift + new_shift) / 2
        if change < 1e-4:
            break
    return shift / tau, 1 / tau


def _truncated(mean: Floats, variance: Floats, bounds: Floats) -> tuple[Floats, Floats]:
    """Mean and variance of normal values that are larger than their bounds."""
    deviation = np.sqrt(variance)
    z = (bounds - mean) / deviation
    hazard = np.exp(-(z**2) / 2 - np.log(2 * np.pi) / 2 - log_ndtr(-z))
    narrowing = np.clip(hazard * (hazard - z), 1e-9, 1 - 1e-6)
    return mean + deviation * hazard, variance * (1 - narrowing)
