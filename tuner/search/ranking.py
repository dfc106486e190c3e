"""Which row of the table to measure next: the best predicted, and then what the measurements make of it.

The predictor's errors that layouts share are learnt from few trials (tuner.search.surrogate). The next row is the one
with the greatest expected improvement of the best time (Jones, Schonlau and Welch 1998, "Efficient global
optimization of expensive black-box functions") for each second that its trial takes, weighed by the probability that it
fits.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tuner.core.layout import KNOBS
from tuner.search.cost import TrialCost
from tuner.search.stopping import DRAWS, Certainty, certainty
from tuner.search.surrogate import Surrogate

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

PAIRS: Final = 524_288
"""Pairs of a row and a measurement that a choice weighs: the more is measured, the fewer rows, the best predicted
ones, so that it takes tens of ms."""
RIVALS: Final = 512
"""Rows left that are drawn jointly: those most likely to beat the best."""


def encode(table: pd.DataFrame) -> Floats:
    """The knobs that vary as columns of numbers: sizes in doublings, switches 0 or 1, texts one column a value.

    A size of 0, which leaves it to Megatron, is a half. Without any knob that varies, one column of zeros.
    """
    columns = []
    for knob in KNOBS:
        column = table[knob]
        if column.nunique() < 2:
            continue
        if pd.api.types.is_bool_dtype(column):
            columns.append(column.to_numpy(dtype=np.float64))
        elif pd.api.types.is_numeric_dtype(column):
            columns.append(doublings(column))
        else:
            columns += [(column == value).to_numpy(dtype=np.float64) for value in column.unique()]
    return np.column_stack(columns) if columns else np.zeros((len(table), 1))


def doublings(sizes: pd.Series) -> Floats:
    """Sizes as logarithms to base 2; 0, which leaves a size to Megatron, is a half."""
    found: Floats = np.log2(np.maximum(sizes.to_numpy(dtype=np.float64), 0.5))
    return found


class Ranking:
    """The order in which to measure the rows of a table.

    Args:
        features: One row of numbers a layout, as `encode` gives them.
        predicted_ms: The predicted step time of every row.
        fits: The probability that every row fits the GPU's memory; None where all do.
    """

    def __init__(self, features: Floats, predicted_ms: Floats, fits: Floats | None = None) -> None:
        self._log_predicted = np.log(predicted_ms)
        self._surrogate = Surrogate(features)
        self._best = np.inf
        self.cost = TrialCost()
        self.refit(np.ones(len(predicted_ms)) if fits is None else fits)

    def refit(self, fits: Floats) -> None:
        """Take in what is now known of the probabilities that rows fit."""
        self._fits = np.maximum(fits, 1e-12)
        # A row that fits every other time costs two launches.
        self._order = np.argsort(self._log_predicted - np.log(self._fits), kind="stable")

    def tell(self, row: int, measured_ms: float) -> None:
        """Take in the measured step time of a row."""
        self._surrogate.observe(row, float(np.log(measured_ms) - self._log_predicted[row]))
        self._best = min(self._best, float(np.log(measured_ms)))

    def tell_slower(self, row: int, bound_ms: float) -> None:
        """Take in that the step time of a row is larger than this."""
        self._surrogate.exceed(row, float(np.log(bound_ms) - self._log_predicted[row]))

    def expected_ms(self, rows: NDArray[np.intp]) -> Floats:
        """The median of what these rows would measure, given all that was."""
        found: Floats = np.exp(self._log_predicted[rows] + self._surrogate.at(rows).mean)
        return found

    def choose(self, available: Mask, in_flight: Sequence[int] = ()) -> int:
        """The row to measure next among those of the mask, while the rows in flight are being measured.

        Raises:
            ValueError: if the mask is empty.
        """
        rows = self._candidates(available, len(in_flight))
        if not len(rows):
            raise ValueError("no row is available")
        scores, expected = self._scores(rows, in_flight)
        return int(rows[np.lexsort((expected, -scores))[0]])

    def score(self, rows: NDArray[np.intp]) -> Floats:
        """The expected improvement of the logarithm of the best step time, a second of each row's trial."""
        return self._scores(rows, ())[0]

    def certainty(self, available: Mask) -> Certainty | None:
        """How near the best measured row is to the best of all; None before the first measurement."""
        if not self._surrogate.measured:
            return None
        rows = self._candidates(available, 0)
        at = self._surrogate.at(rows)
        z = (self._best - self._log_predicted[rows] - at.mean) / at.deviation
        likely = np.argsort(-self._fits[rows] * stdtr(at.freedom, z), kind="stable")[:RIVALS]
        rivals = rows[likely]
        # The same draws after a resume: they depend on what was measured alone.
        random = np.random.default_rng(self._surrogate.measured)
        with threadpool_limits(limits=1, user_api="blas"):
            errors = self._surrogate.draw(rivals, DRAWS, random)
        return certainty(
            self._best,
            self._log_predicted[rivals] + errors,
            self._fits[rivals],
            self._surrogate.measured,
            random,
        )

    def _candidates(self, available: Mask, in_flight: int) -> NDArray[np.intp]:
        measured = self._surrogate.informed + in_flight
        return self._order[available[self._order]][: PAIRS // max(1, measured)]

    def _scores(self, rows: NDArray[np.intp], in_flight: Sequence[int]) -> tuple[Floats, Floats]:
        """Of each row the score, and the expected logarithm of its step time."""
        # Matrices this small gain nothing from threads, which on busy cores wait for each other: 15 ms become 1 s.
        with threadpool_limits(limits=1, user_api="blas"):
            at = self._surrogate.at(rows, in_flight)
            flying = np.array(in_flight, dtype=np.intp)
            believed = self._log_predicted[flying] + self._surrogate.at(flying).mean
        expected = self._log_predicted[rows] + at.mean
        best = min(self._best, *believed, np.inf)
        if best == np.inf:
            return -np.exp(expected) / self._fits[rows], expected
        gain = _expected_improvement(best - expected, at.deviation, at.freedom)
        return gain * self._fits[rows] / self.cost.seconds(np.exp(expected)), expected


def _expected_improvement(gain: Floats, deviation: Floats, freedom: float) -> Floats:
    """By how much a Student-t value is expected to fall below the best, where its median does by `gain`."""
    z = gain / deviation
    log_peak = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - np.log(freedom * np.pi) / 2
    density = np.exp(log_peak - (freedom + 1) / 2 * np.log1p(z**2 / freedom))
    improvement: Floats = gain * stdtr(freedom, z) + deviation * (freedom + z**2) / (freedom - 1) * density
    return np.maximum(improvement, 0.0)
