"""What the measurements say about the predictor's errors: a Student-t process on log(measured / predicted).

The error of a layout is the sum of a bias that all layouts of a workload share, a part that close layouts share, and a
part of its own. The common variance of these parts is learnt too: it has an inverse-gamma prior, which makes the
Gaussian process a Student-t process (Shah, Wilson and Ghahramani 2014, "Student-t processes as alternatives to
Gaussian processes") that is wide while little is measured. Trials that ended before they measured a step time enter as
bounds (tuner.search.censoring). Rows in flight enter with their expected value (the kriging believer: Ginsbourger, Le
Riche and Carraro 2010, "Kriging is well-suited to parallelize optimization").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular  # type: ignore[import-untyped]
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

from tuner.core.columns import Floats
from tuner.search.censoring import bound_sites

ERROR: Final = 0.2
"""Prior standard deviation of a layout's error besides the bias, as a logarithm. Assumed, for a predictor that was
never held against measurements of the workload; on the recorded groups of vTrain the deviation is 0.1 (measured)."""
ERROR_WEIGHT: Final = 2.0
"""Number of measurements that this prior counts as: its degrees of freedom. Assumed."""
BIAS: Final = 8.0
"""Standard deviation of the shared bias, in units of ERROR: 8 x 0.2 = 1.6 as a logarithm, which is a factor of 5.
Assumed, for a predictor that nothing has calibrated."""
REACH: Final = 4.0
"""Doublings of a knob over which the correlation of the shared part falls to 1/e. Measured: see OWN_PART."""
OWN_PART: Final = 0.3
"""Standard deviation of a layout's own part and of its repeats together, in units of ERROR.

REACH, OWN_PART and the exponential kernel are measured: they give the greatest predictive density of rows not yet
measured, given 2, 4 and 8 rows, over the recorded groups of vTrain. There 90% intervals hold 93 to 99% of the rows. On
the landscape cpu-4-tiny-gpt, which was not used to choose them, they hold 91 to 93%.
"""

MOST_MEASURED: Final = 512
"""The most measurements that the surrogate is fitted to, since the time of a fit grows with their cube. Beyond it, the
older half of them are the fastest, and the newer half the latest. Chosen: see docs/search.md."""
MOST_BOUNDS: Final = 256
"""The most bounds that the surrogate is fitted to: the latest. Chosen, for the same reason."""


@dataclass(frozen=True, slots=True)
class Posterior:
    """The errors of some rows as a multivariate Student-t distribution."""

    mean: Floats
    """The mean of each row's error, of shape [rows]."""
    deviation: Floats
    """The scale of each row's error, of shape [rows]; few degrees of freedom make the standard deviation larger."""
    freedom: float
    """Degrees of freedom of the distribution."""


class Surrogate:
    """The predictor's errors, learnt from the rows that were measured.

    Args:
        features: The rows as points, of shape [rows, columns].
    """

    def __init__(self, features: Floats) -> None:
        self._features = features
        self._rows: list[int] = []
        self._errors: list[float] = []
        self._log_ms: list[float] = []
        self._bounds: dict[int, float] = {}
        self._fits: dict[tuple[int, ...], _Fit] = {}

    @property
    def measured(self) -> int:
        """The number of measurements."""
        return len(self._rows)

    @property
    def informed(self) -> int:
        """The number of measurements and bounds that the surrogate is fitted to."""
        return min(len(self._rows), MOST_MEASURED) + min(len(self._bounds), MOST_BOUNDS)

    def observe(self, row: int, error: float, log_ms: float) -> None:
        """Learn log(measured / predicted) of a row, whose measured step time has the logarithm `log_ms`."""
        self._rows.append(row)
        self._errors.append(error)
        self._log_ms.append(log_ms)
        self._fits.clear()

    def exceed(self, row: int, bound: float) -> None:
        """Learn that log(measured / predicted) of a row is larger than `bound`."""
        self._bounds[row] = max(bound, self._bounds.get(row, bound))
        self._fits.clear()

    def at(self, rows: NDArray[np.intp], in_flight: Sequence[int] = ()) -> Posterior:
        """Return the errors that `rows` would measure, as if the rows in flight had measured their expected values."""
        fit = self._fit(tuple(in_flight))
        mean, _, variance = fit.at(self._features[rows])
        return Posterior(mean, np.sqrt(fit.scale * (variance + OWN_PART**2)), fit.freedom)

    def draw(self, rows: NDArray[np.intp], draws: int, random: np.random.Generator) -> Floats:
        """Return joint draws of the errors of `rows`, of shape [draws, len(rows)]."""
        fit = self._fit(())
        points = self._features[rows]
        mean, reduced, _ = fit.at(points)
        covariance = _covariance(points, points) - reduced.T @ reduced + OWN_PART**2 * np.eye(len(rows))
        root = cholesky(covariance, lower=True)
        scales = fit.scale * fit.freedom / random.chisquare(fit.freedom, (draws, 1))
        errors: Floats = mean + np.sqrt(scales) * (random.standard_normal((draws, len(rows))) @ root.T)
        return errors

    def _fit(self, in_flight: tuple[int, ...]) -> "_Fit":
        if in_flight not in self._fits:
            self._fits[in_flight] = self._refit(in_flight)
        return self._fits[in_flight]

    def _refit(self, in_flight: tuple[int, ...]) -> "_Fit":
        if in_flight:
            fit = self._fit(())
            points = self._features[list(in_flight)]
            return fit.extended(points, fit.at(points)[0], np.full(len(points), OWN_PART**2))
        fitted = self._fitted()
        exact = _Fit.of(
            self._features[np.array(self._rows, dtype=np.intp)[fitted]], np.array(self._errors)[fitted]
        )
        if not self._bounds:
            return exact
        latest_bounds = list(self._bounds.items())[-MOST_BOUNDS:]
        points = self._features[[row for row, _ in latest_bounds]]
        bounds = np.array([bound for _, bound in latest_bounds])
        mean, reduced, _ = exact.at(points)
        covariance = _covariance(points, points) - reduced.T @ reduced + OWN_PART**2 * np.eye(len(points))
        values, variances = bound_sites(mean, exact.scale * covariance, bounds)
        return exact.extended(points, values, OWN_PART**2 + variances / exact.scale)

    def _fitted(self) -> NDArray[np.intp]:
        """Return which measurements the surrogate is fitted to, in the order in which they were learnt."""
        if len(self._rows) <= MOST_MEASURED:
            return np.arange(len(self._rows))
        older = len(self._rows) - MOST_MEASURED // 2
        fastest = np.argsort(self._log_ms[:older], kind="stable")[: MOST_MEASURED - MOST_MEASURED // 2]
        return np.concatenate([np.sort(fastest), np.arange(older, len(self._rows))])


@dataclass(frozen=True, slots=True)
class _Fit:
    """A process of unit scale, fitted to n points, and the learnt scale."""

    points: Floats
    """The fitted points, of shape [n, columns]."""
    values: Floats
    """The fitted values, of shape [n]."""
    noise: Floats
    """The variance of each value besides that of the process, of shape [n]."""
    root: Floats
    """The lower Cholesky factor of the values' covariance, of shape [n, n]."""
    weights: Floats
    """The inverse of `root` times the values, of shape [n]."""
    scale: float
    """The variance of an error, as the exact measurements suggest it."""
    freedom: float
    """Degrees of freedom of `scale`."""

    @classmethod
    def of(cls, points: Floats, values: Floats) -> "_Fit":
        """Fit exact measurements."""
        noise = np.full(len(values), OWN_PART**2)
        root, weights = _factorised(points, values, noise)
        freedom = ERROR_WEIGHT + len(values)
        scale = (ERROR_WEIGHT * ERROR**2 + float(weights @ weights)) / freedom
        return cls(points, values, noise, root, weights, scale, freedom)

    def extended(self, points: Floats, values: Floats, noise: Floats) -> "_Fit":
        """Return a fit to further values; they are not measured, so they do not change the scale."""
        points, values = np.vstack([self.points, points]), np.concatenate([self.values, values])
        noise = np.concatenate([self.noise, noise])
        return _Fit(points, values, noise, *_factorised(points, values, noise), self.scale, self.freedom)

    def at(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """Return what the fit says about the process at m points.

        Returns:
            The mean of shape [m], the inverse of `root` times the covariance with the fitted points of shape [n, m],
            and the variance at unit scale of shape [m].
        """
        if not len(self.values):
            return np.zeros(len(points)), np.zeros((0, len(points))), np.full(len(points), BIAS**2 + 1)
        reduced = solve_triangular(
            self.root, _covariance(self.points, points), lower=True, check_finite=False
        )
        variance = np.maximum(BIAS**2 + 1 - np.einsum("ij,ij->j", reduced, reduced), 0.0)
        return self.weights @ reduced, reduced, variance


def _covariance(points: Floats, others: Floats) -> Floats:
    """Return the covariance of the errors at every pair of points, at unit scale, of shape [points, others]."""
    covariance = cdist(points, others)
    covariance *= -1 / REACH
    np.exp(covariance, out=covariance)
    covariance += BIAS**2
    return np.asarray(covariance)


def _factorised(points: Floats, values: Floats, noise: Floats) -> tuple[Floats, Floats]:
    """Return the lower Cholesky factor of the values' covariance, and the inverse of this factor times the values."""
    if not len(values):
        return np.zeros((0, 0)), np.zeros(0)
    covariance = _covariance(points, points)
    covariance[np.diag_indices_from(covariance)] += noise
    root = cholesky(covariance, lower=True, check_finite=False)
    return root, solve_triangular(root, values, lower=True, check_finite=False)
