"""The probability that a layout fits into the GPU's memory: first predicted, then corrected by ended trials."""

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
"""Smallest probability of fitting into memory at which a sweep launches a row. Chosen."""
SHARED_ERROR: Final = 0.03
"""Prior standard deviation of the error that all layouts of a workload share. The error is log(measured / predicted
allocated memory). Assumed."""
LAYOUT_ERROR: Final = 0.02
"""Prior median of the standard deviation of a layout's own error, which is added to the shared error. Measured with
`python -m tests.bench.oracle_memory` on 200 layouts: the mean error was below 1%, the largest 4%."""
ROUTED_LAYOUT_ERROR: Final = 0.05
"""The value in place of `LAYOUT_ERROR` for a model whose router is free to load its experts unevenly
(tuner/predict/routing.py). Assumed: which rank gets the most tokens is random."""
LAYOUT_ERROR_FACTOR: Final = 2.0
"""The standard deviation of a layout's own error has a log-normal prior around its median; one prior standard deviation
multiplies or divides it by this factor. Assumed."""
TOTAL_ERROR: Final = 0.02
"""Prior standard deviation of log(total / predicted total memory) on CUDA, to which the uncertainty of the memory
outside the allocator is added. The value is used twice: for the error that all layouts share, and for a layout's own
error. Assumed."""
LARGEST_TOTAL_ERROR: Final = 0.5
"""Largest prior standard deviation of log(total / predicted total memory), a factor of 1.65 either way. It limits the
size of the grid if most of a GPU's memory is predicted to be outside the allocator. Chosen."""

_GRID_STEP: Final = 0.004
"""Distance between two neighbouring points of the posterior's grid, as a difference of logarithms."""
_CURVE_ROOMS: Final = np.linspace(-0.7, 0.7, 401)
"""Values of a row's room (see `Feasibility._room`) for which the probability of fitting is computed; it is interpolated
for all others."""


class Feasibility:
    """The probability that each row of a table of valid layouts fits into memory, given the trials passed to `tell`.

    A layout fits if its total memory is at most the GPU's memory. The total is the allocated memory times the
    allocator's reserved ratio, plus the memory outside the allocator. The prediction has two unknown errors. The first
    is log(measured / predicted allocated memory). It is normally distributed; its mean is the error that all layouts
    share, its standard deviation is that of a layout's own error, and both are equal for all layouts and unknown. The
    second, on CUDA only, is log(total / predicted total), and all layouts share it. A grid holds the joint posterior,
    of shape [shared error, standard deviation of a layout's own error, error of the total].

    A trial that completed gives the first error of its row, and shows that the row's total fits. A trial that ran out
    of memory shows that the row's total does not fit. The result is deterministic, and the order of the trials does not
    matter.
    """

    def __init__(self, table: pd.DataFrame, workload: Workload, cluster: Cluster) -> None:
        memory_gib = cluster.gpu.memory_gib
        self._predicted_gib = peak_gib(table, workload, cluster, implementation_of(cluster))
        beyond_gib = beyond_allocated_gib(table, workload, cluster)
        left_gib = np.maximum(memory_gib - beyond_gib, 1e-6 * memory_gib)
        self._room: Floats = np.log(left_gib / reserved_ratio(table, cluster) / self._predicted_gib)
        """Largest log(measured / predicted allocated memory) at which each row fits, if its predicted total has no
        error."""
        free_router = workload.model.is_moe and not workload.moe_router_force_load_balancing
        median_error = ROUTED_LAYOUT_ERROR if free_router else LAYOUT_ERROR
        error_deviations = np.linspace(-2.5, 3, 12)
        shared_errors = np.arange(-6 * SHARED_ERROR, 10 * SHARED_ERROR, _GRID_STEP)
        total_errors, self._own_total_error = np.zeros(1), 1e-6
        total_prior = np.zeros(1)
        if cluster.device == "cuda":
            mean_beyond_gib = float(np.mean(beyond_gib)) if len(table) else 0.0
            uncertain_share = UNCERTAINTY * mean_beyond_gib / memory_gib
            deviation = min(np.hypot(TOTAL_ERROR, uncertain_share), LARGEST_TOTAL_ERROR)
            total_errors = np.arange(-3 * deviation, 3 * deviation, 4 * _GRID_STEP)
            total_prior = -0.5 * (total_errors / deviation) ** 2
            self._own_total_error = TOTAL_ERROR
        self._shared_errors, self._total_errors = shared_errors[:, None, None], total_errors[None, None, :]
        self._layout_errors = (median_error * LAYOUT_ERROR_FACTOR**error_deviations)[None, :, None]
        shared_prior = (self._shared_errors / SHARED_ERROR) ** 2
        self._log_weight: Floats = -0.5 * (shared_prior + (error_deviations**2)[None, :, None]) + total_prior

    def tell(self, row: int, measured_gib: float | None) -> None:
        """Update the posterior with a trial of `row` that completed or ran out of memory.

        Args:
            row: Position of the trial's layout in the table.
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
        """Return the probability that each row of the table fits into memory, given all trials so far; shape [rows]."""
        weight = np.exp(self._log_weight - self._log_weight.max())
        fits = np.zeros_like(_CURVE_ROOMS)
        # The probability depends only on a row's room and on the sum of both errors. To interpolate curves over the
        # room takes less time than to sum over the grid for each row.
        for number, curve in enumerate(self._curves):
            fits += curve.fits @ np.bincount(curve.index, weight[:, number].ravel())
        probability: Floats = np.interp(self._room, _CURVE_ROOMS, fits / weight.sum())
        return probability

    @cached_property
    def _curves(self) -> tuple["_Curve", ...]:
        """Return the probability of fitting as a function of a row's room, as several curves.

        There is one curve per standard deviation of a layout's own error on the grid; the room is `_room`. The curves
        do not depend on trials, which change only the weights with which `probabilities` adds the curves up.
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
    """A curve that gives the probability that a row fits into memory, for a given room of the row.

    `Feasibility._room` defines the room. A curve belongs to one standard deviation of a layout's own prediction error.
    """

    index: NDArray[np.intp]
    """Column of `fits` for each pair of a shared error and an error of the total on the grid, flattened."""
    fits: Floats
    """Probability of fitting for each room in `_CURVE_ROOMS` and each distinct sum of the two errors; shape [rooms,
    sums]."""


def fit_probabilities(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Floats:
    """Return the predicted probability that each row of a table of valid layouts fits into memory, before any trial.

    The result has shape [rows].
    """
    return Feasibility(table, workload, cluster).probabilities()
