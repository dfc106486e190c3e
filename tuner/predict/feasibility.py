"""The probability that a layout fits into the GPU's memory, as predicted and as finished trials correct it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr  # type: ignore[import-untyped]

from tuner.core.cluster import Cluster
from tuner.core.columns import Floats
from tuner.core.workload import Workload
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.overhead import UNCERTAINTY, beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import peak_gib

MIN_FIT: Final = 0.01
"""Smallest probability of fitting with which a sweep launches a row. A choice."""
SHARED_ERROR: Final = 0.03
"""Prior standard deviation of the error that all layouts of a workload share. The error is log(measured / predicted
allocated memory). Assumed."""
LAYOUT_ERROR: Final = 0.02
"""Prior median of the standard deviation of a layout's own error. Measured with `python -m tests.bench.oracle_memory`
on 200 layouts: the mean error was below 1%, the largest 4%."""
ROUTED_LAYOUT_ERROR: Final = 0.05
"""`LAYOUT_ERROR` of a model whose router is free to load its experts unevenly (tuner/predict/routing.py). Assumed:
which rank gets the most tokens is luck."""
LAYOUT_ERROR_FACTOR: Final = 2.0
"""Factor by which the standard deviation of a layout's own error grows per prior standard deviation of its logarithm.
Assumed."""
TOTAL_ERROR: Final = 0.02
"""Prior standard deviation of log(total / predicted total) on CUDA, beyond the uncertainty of what is held beside the
allocated memory. It stands both for the error that all layouts share and for a layout's own. Assumed."""
LARGEST_TOTAL_ERROR: Final = 0.5
"""Largest prior standard deviation of log(total / predicted total), a factor of 1.65 either way. It bounds the grid
where a GPU has less memory than what is predicted beside the allocated memory. A choice."""

_GRID_STEP: Final = 0.004
"""Distance between two points of the posterior's grid, as a logarithm."""
_CURVE_ROOMS: Final = np.linspace(-0.7, 0.7, 401)
"""Rooms, as logarithms, at which the probability to fit is computed (see `Feasibility._room`)."""


class Feasibility:
    """The probability that each row of a table of valid layouts fits, corrected by the trials that `tell` gets.

    A layout fits if its total, allocated memory x reserved ratio + what is held beside it, is at most the GPU's memory.
    Two errors are uncertain. The first is log(measured / predicted allocated memory): it is normal around an error that
    all layouts share, with a standard deviation that all layouts share; both are unknown. The second, on CUDA only, is
    log(total / predicted total), and all layouts share it. A grid holds their joint posterior, of shape [shared error,
    standard deviation of the layout's own error, error of the total].

    A finished trial gives the first error of its row, and shows that the row's total fit. A trial that ran out of
    memory shows that the row's total did not fit. Nothing is drawn at random, and the order of the trials does not
    matter.
    """

    def __init__(self, table: pd.DataFrame, workload: Workload, cluster: Cluster) -> None:
        memory_gib = cluster.gpu.memory_gib
        self._predicted_gib = peak_gib(table, workload, cluster, implementation_of(cluster))
        beyond_gib = beyond_allocated_gib(table, workload, cluster)
        left_gib = np.maximum(memory_gib - beyond_gib, 1e-6 * memory_gib)
        self._room: Floats = np.log(left_gib / reserved_ratio(table, cluster) / self._predicted_gib)
        """Largest log(measured / predicted allocated memory) with which each row fits, if the total has no error."""
        free_router = workload.model.is_moe and not workload.moe_router_force_load_balancing
        median_error = ROUTED_LAYOUT_ERROR if free_router else LAYOUT_ERROR
        error_deviations = np.linspace(-2.5, 3, 12)
        shared_errors = np.arange(-6 * SHARED_ERROR, 10 * SHARED_ERROR, _GRID_STEP)
        total_errors, self._own_total_error = np.zeros(1), 1e-6
        total_prior = np.zeros(1)
        if cluster.device == "cuda":
            uncertain_share = UNCERTAINTY * float(np.mean(beyond_gib)) / memory_gib
            deviation = min(np.hypot(TOTAL_ERROR, uncertain_share), LARGEST_TOTAL_ERROR)
            total_errors = np.arange(-3 * deviation, 3 * deviation, 4 * _GRID_STEP)
            total_prior = -0.5 * (total_errors / deviation) ** 2
            self._own_total_error = TOTAL_ERROR
        self._shared_errors, self._total_errors = shared_errors[:, None, None], total_errors[None, None, :]
        self._layout_errors = (median_error * LAYOUT_ERROR_FACTOR**error_deviations)[None, :, None]
        shared_prior = (self._shared_errors / SHARED_ERROR) ** 2
        self._log_weight: Floats = -0.5 * (shared_prior + (error_deviations**2)[None, :, None]) + total_prior

    def tell(self, row: int, measured_gib: float | None) -> None:
        """Learn from a finished trial of `row`.

        Args:
            row: The row of the table.
            measured_gib: The peak of allocated memory that the trial measured; None if it ran out of memory.
        """
        room = self._room[row]
        if measured_gib is None:
            deviation = np.hypot(self._layout_errors, self._own_total_error)
            excess = self._shared_errors + self._total_errors - room
            self._log_weight = self._log_weight + log_ndtr(excess / deviation)
            return
        error = np.log(measured_gib / self._predicted_gib[row])
        own_errors = (error - self._shared_errors) / self._layout_errors
        log_density = -0.5 * own_errors**2 - np.log(self._layout_errors)
        log_fits = 0.0
        if self._total_errors.size > 1:
            log_fits = log_ndtr((room - error - self._total_errors) / self._own_total_error)
        self._log_weight = self._log_weight + log_density + log_fits

    def probabilities(self) -> Floats:
        """Return the probability that each row fits, of shape [rows]."""
        weight = np.exp(self._log_weight - self._log_weight.max())
        fits = np.zeros_like(_CURVE_ROOMS)
        # The probability depends only on a row's room and on the sum of both errors. A curve over the room, computed
        # once, costs less than the posterior at each row.
        for number, curve in enumerate(self._curves):
            fits += curve.fits @ np.bincount(curve.index, weight[:, number].ravel())
        probability: Floats = np.interp(self._room, _CURVE_ROOMS, fits / weight.sum())
        return probability

    @cached_property
    def _curves(self) -> tuple["_Curve", ...]:
        """Return one curve per standard deviation of the layout's own error.

        A trial changes only the weights with which `probabilities` adds up the curves.
        """
        sums = np.broadcast_to(self._shared_errors + self._total_errors, self._log_weight.shape)
        deviations = np.hypot(self._layout_errors, self._own_total_error).ravel()
        curves = []
        for number, deviation in enumerate(deviations):
            centres, index = np.unique(np.round(sums[:, number] / _GRID_STEP), return_inverse=True)
            fits = ndtr((_CURVE_ROOMS[:, None] - centres * _GRID_STEP) / deviation)
            curves.append(_Curve(index=index.ravel(), fits=fits))
        return tuple(curves)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curve:
    """The probability to fit as a function of the room, for one standard deviation of the layout's own error."""

    index: NDArray[np.intp]
    """Column of `fits` for each sum of both errors on the grid, flattened."""
    fits: Floats
    """Probability to fit for each room and each distinct sum of both errors; shape [rooms, sums]."""


def fit_probabilities(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Floats:
    """Return the probability that each row of a table of valid layouts fits, before any trial; shape [rows]."""
    return Feasibility(table, workload, cluster).probabilities()
