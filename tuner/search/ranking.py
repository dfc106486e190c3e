"""Which row of the table to measure next: the best predicted row, and then whatever the measurements suggest.

A few trials teach the surrogate (tuner.search.surrogate) the errors of the predictor that layouts share. The next row
is the one with the greatest expected improvement of the best time (Jones, Schonlau and Welch 1998, "Efficient global
optimization of expensive black-box functions") per second of its trial, times the probability that it fits the GPU's
memory.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr  # type: ignore[import-untyped]
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from tuner.core.columns import Bools, Floats
from tuner.search.cost import TrialCost
from tuner.search.stopping import JOINT_DRAWS, Certainty, certainty
from tuner.search.surrogate import Surrogate

MOST_PAIRS: Final = 524_288
"""Largest number of pairs of a row and a measurement that one choice evaluates: the more is measured, the fewer of the
best predicted rows are considered. Measured by tests/bench/ask.py: a choice then takes tens of ms."""
MOST_RIVALS: Final = 512
"""Largest number of rows that are drawn jointly: the rows left that are most likely to beat the best. Assumed."""


class Ranking:
    """The order in which to measure the rows of a table.

    Args:
        features: The rows as points, of shape [rows, columns], as `encode` gives them.
        predicted_ms: The predicted step time of every row, of shape [rows].
        fits: The probability that each row fits the GPU's memory, of shape [rows]; None if all rows do.
    """

    def __init__(self, features: Floats, predicted_ms: Floats, fits: Floats | None = None) -> None:
        self._log_predicted = np.log(predicted_ms)
        self._surrogate = Surrogate(features)
        self._best_log = np.inf
        self.cost = TrialCost()
        self.refit(np.ones(len(predicted_ms)) if fits is None else fits)

    def refit(self, fits: Floats) -> None:
        """Replace the probabilities that rows fit."""
        self._fits = np.maximum(fits, 1e-12)
        # A row that fits with probability 1/2 costs two launches on average.
        self._order = np.argsort(self._log_predicted - np.log(self._fits), kind="stable")

    def tell(self, row: int, measured_ms: float) -> None:
        """Learn the measured step time of a row."""
        log_ms = float(np.log(measured_ms))
        self._surrogate.observe(row, float(log_ms - self._log_predicted[row]), log_ms)
        self._best_log = min(self._best_log, log_ms)

    def tell_slower(self, row: int, bound_ms: float) -> None:
        """Learn that the step time of a row is larger than `bound_ms`."""
        self._surrogate.exceed(row, float(np.log(bound_ms) - self._log_predicted[row]))

    def expected_ms(self, rows: NDArray[np.intp]) -> Floats:
        """Return the median of what these rows would measure, given all measurements, of shape [len(rows)]."""
        medians_ms: Floats = np.exp(self._log_predicted[rows] + self._surrogate.at(rows).mean)
        return medians_ms

    def choose(self, available: Bools, in_flight: Sequence[int] = ()) -> int:
        """Return the row of the mask `available` to measure next, while the rows in flight are being measured.

        Raises:
            ValueError: if the mask is empty.
        """
        rows = self._considered(available, len(in_flight))
        if not len(rows):
            raise ValueError("no row is available")
        scores, expected_log = self._scores(rows, in_flight)
        return int(rows[np.lexsort((expected_log, -scores))[0]])

    def score(self, rows: NDArray[np.intp]) -> Floats:
        """Return the score of each row, of shape [len(rows)].

        It is the expected improvement of the logarithm of the best step time per second of the row's trial, times the
        probability that the row fits.
        """
        return self._scores(rows, ())[0]

    def certainty(self, available: Bools) -> Certainty | None:
        """Return how near the best measured row is to the best of all; None before the first measurement."""
        if not self._surrogate.measured:
            return None
        rows = self._considered(available, 0)
        with _one_blas_thread():
            at = self._surrogate.at(rows)
        z = (self._best_log - self._log_predicted[rows] - at.mean) / at.deviation
        likeliest = np.argsort(-self._fits[rows] * stdtr(at.freedom, z), kind="stable")[:MOST_RIVALS]
        rivals = rows[likeliest]
        # Seeded by the number of measurements alone, so that a resumed sweep makes equal draws.
        random = np.random.default_rng(self._surrogate.measured)
        with _one_blas_thread():
            errors = self._surrogate.draw(rivals, JOINT_DRAWS, random)
        return certainty(
            self._best_log,
            self._log_predicted[rivals] + errors,
            self._fits[rivals],
            measured=self._surrogate.measured,
            random=random,
        )

    def _considered(self, available: Bools, in_flight: int) -> NDArray[np.intp]:
        """Return the available rows, the best predicted first, as many as MOST_PAIRS allows."""
        informed = self._surrogate.informed + in_flight
        return self._order[available[self._order]][: MOST_PAIRS // max(1, informed)]

    def _scores(self, rows: NDArray[np.intp], in_flight: Sequence[int]) -> tuple[Floats, Floats]:
        """Return the score of each row, and the expected logarithm of its step time, both of shape [len(rows)]."""
        with _one_blas_thread():
            at = self._surrogate.at(rows, in_flight)
            flying = np.array(in_flight, dtype=np.intp)
            believed_log = self._log_predicted[flying] + self._surrogate.at(flying).mean
        expected_log = self._log_predicted[rows] + at.mean
        best_log = min(self._best_log, *believed_log, np.inf)
        if best_log == np.inf:
            return -np.exp(expected_log) / self._fits[rows], expected_log
        gain = _expected_improvement(best_log - expected_log, at.deviation, at.freedom)
        return gain * self._fits[rows] / self.cost.seconds(np.exp(expected_log)), expected_log


def _one_blas_thread() -> AbstractContextManager[object]:
    """Limit BLAS to one thread.

    Matrices this small gain nothing from more threads, and on busy cores threads wait for each other: 15 ms become 1 s.
    """
    limit: AbstractContextManager[object] = _blas_controller().limit(limits=1, user_api="blas")
    return limit


@cache
def _blas_controller() -> ThreadpoolController:
    """Return the controller of the BLAS libraries that numpy and scipy use; to search for them takes 5 ms."""
    return ThreadpoolController()


def _expected_improvement(gain: Floats, deviation: Floats, freedom: float) -> Floats:
    """Return by how much Student-t values are expected to fall below the best, where values above it count as 0.

    Args:
        gain: by how much the median of each value is below the best; negative if it is above.
        deviation: the scale of each value.
        freedom: the degrees of freedom of all values.
    """
    z = gain / deviation
    log_peak = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - np.log(freedom * np.pi) / 2
    density = np.exp(log_peak - (freedom + 1) / 2 * np.log1p(z**2 / freedom))
    improvement: Floats = gain * stdtr(freedom, z) + deviation * (freedom + z**2) / (freedom - 1) * density
    return np.maximum(improvement, 0.0)
