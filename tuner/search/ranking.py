"""Which row of the table to measure next: the best predicted, and then what the measurements make of it.

A Gaussian process learns log(measured / predicted) over the knobs, so that the predictor's errors that layouts
share are learnt from few trials; the next row is the one with the greatest expected improvement of the best time
(Jones, Schonlau and Welch 1998, "Efficient global optimization of expensive black-box functions").
"""

from math import erf, sqrt
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tuner.layout import KNOBS

BIAS: Final = 0.3
"""Prior deviation of log(measured / predicted) that all layouts of a workload share."""
ERROR: Final = 0.12
"""The same of what single layouts differ from it: the predictor's own error."""
REACH: Final = 2.0
"""How far, in doublings of a knob, two layouts still err alike."""
NOISE: Final = 0.02
"""Deviation of a repeated measurement."""
CANDIDATES: Final = 1024
"""Rows that are weighed, the best predicted ones: a worse row has no hope, and weighing all would take seconds."""


def encode(table: pd.DataFrame) -> NDArray[np.float64]:
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
            columns.append(np.log2(np.maximum(column.to_numpy(dtype=np.float64), 0.5)))
        else:
            columns += [(column == value).to_numpy(dtype=np.float64) for value in column.unique()]
    return np.column_stack(columns) if columns else np.zeros((len(table), 1))


class Ranking:
    """The order in which to measure the rows of a table.

    Args:
        features: One row of numbers a layout, as `encode` gives them.
        predicted_ms: The predicted step time of every row.
        fits: The probability that every row fits the GPU's memory; None where all do.
    """

    def __init__(
        self,
        features: NDArray[np.float64],
        predicted_ms: NDArray[np.float64],
        fits: NDArray[np.float64] | None = None,
    ) -> None:
        self._fits = np.ones(len(predicted_ms)) if fits is None else fits
        self._features = features
        self._log_predicted = np.log(predicted_ms)
        # A row that fits every other time costs two launches.
        self._order = np.argsort(predicted_ms / self._fits, kind="stable")
        self._rows: list[int] = []
        self._errors: list[float] = []
        kernel = ConstantKernel(BIAS**2) + ConstantKernel(ERROR**2) * Matern(REACH, nu=2.5)
        self._process = GaussianProcessRegressor(kernel + WhiteKernel(NOISE**2), optimizer=None)
        self._stale = False

    def tell(self, row: int, measured_ms: float) -> None:
        """Take in the measured step time of a row."""
        self._rows.append(row)
        self._errors.append(float(np.log(measured_ms) - self._log_predicted[row]))
        self._stale = True

    def choose(self, available: NDArray[np.bool_]) -> int:
        """The row to measure next among those of the mask.

        Raises:
            ValueError: if the mask is empty.
        """
        rows = self._order[available[self._order]][:CANDIDATES]
        if not len(rows):
            raise ValueError("no row is available")
        if not self._rows:
            return int(rows[0])
        error, deviation = self._learnt(rows)
        expected = self._log_predicted[rows] + error
        best = float(np.min(np.array(self._errors) + self._log_predicted[self._rows]))
        gain = _expected_improvement(best - expected, deviation) * self._fits[rows]
        return int(rows[np.lexsort((expected, -gain))[0]])

    def _learnt(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of log(measured / predicted)."""
        # Matrices this small gain nothing from threads, which on busy cores wait for each other: 15 ms become 1 s.
        with threadpool_limits(limits=1, user_api="blas"):
            if self._stale:
                self._process.fit(self._features[self._rows], np.array(self._errors))
                self._stale = False
            mean, deviation = self._process.predict(self._features[rows], return_std=True)
        return mean, deviation


def _expected_improvement(gain: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much a row is expected to fall below the best, where it is expected to by `gain`."""
    z = gain / deviation
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    below = np.array([0.5 * (1 + erf(value / sqrt(2))) for value in z])
    improvement: NDArray[np.float64] = gain * below + deviation * density
    return improvement
