"""Whether a layout fits: with what probability, as finished trials correct it, and when it is not worth a launch."""

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr  # type: ignore[import-untyped]

from tuner.core.cluster import Cluster
from tuner.core.workload import Workload
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.overhead import UNCERTAINTY, beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import peak_gib

Floats = NDArray[np.float64]

MIN_FIT: Final = 0.01
"""A row that fits with a smaller probability is never launched."""
BIAS: Final = 0.03
"""Prior deviation of the error that all layouts of a workload share, of log(measured / predicted allocated)."""
ERROR: Final = 0.02
"""Prior median of the deviation of a layout's own error: on 200 layouts the mean error was below 1%, the worst 4%."""
ROUTING_ERROR: Final = 0.05
"""The same where the router is free: which rank gets the most tokens is luck (tuner/predict/routing.py)."""
ERROR_FACTOR: Final = 2.0
"""One deviation of the deviation's own uncertainty: twice as much, or half."""
RATIO_ERROR: Final = 0.02
"""Prior deviation of the allocator's share, and what one layout's differs from another's."""
MOST_UNCERTAIN: Final = 0.5
"""The widest prior deviation of the total's logarithm, two thirds more or less: where a GPU is smaller than what is
held beside the allocated memory, the grid would grow without end."""

_STEP: Final = 0.004
"""Between two points of the posterior's grid, in either logarithm."""
_ROOMS: Final = np.linspace(-0.7, 0.7, 401)


class Feasibility:
    """P(fits) of every row of a table of valid layouts, corrected by every trial told.

    A layout fits if allocated * reserved ratio + what is held beside it is at most the GPU's memory. Two logarithms
    are uncertain: of allocated / predicted, normal around a common bias with a common deviation, both unknown; and, on
    CUDA, of the total over what these constants make it, common to all rows. Their joint posterior is held on a grid. A
    finished trial tells its ratio, and that it fit with it; one that ran out of memory, that its total did not fit.
    Nothing is drawn at random, and the order of the trials does not matter.
    """

    def __init__(self, table: pd.DataFrame, workload: Workload, cluster: Cluster) -> None:
        memory_gib = cluster.gpu.memory_gib
        self._predicted_gib = peak_gib(table, workload, cluster, implementation_of(cluster))
        beyond_gib = beyond_allocated_gib(table, workload, cluster)
        left_gib = np.maximum(memory_gib - beyond_gib, 1e-6 * memory_gib)
        self._room: Floats = np.log(left_gib / reserved_ratio(table, cluster) / self._predicted_gib)
        """Logarithm of the largest measured / predicted with which each row fits, if the constants are right."""
        free = workload.model.is_moe and not workload.moe_router_force_load_balancing
        scale, spread = ROUTING_ERROR if free else ERROR, np.linspace(-2.5, 3, 12)
        bias = np.arange(-6 * BIAS, 10 * BIAS, _STEP)
        beyond, self._own = np.zeros(1), 1e-6
        if cluster.device == "cuda":
            share = UNCERTAINTY * float(np.mean(beyond_gib)) / memory_gib
            deviation = min(np.hypot(RATIO_ERROR, share), MOST_UNCERTAIN)
            beyond, self._own = np.arange(-3 * deviation, 3 * deviation, 4 * _STEP), RATIO_ERROR
            prior = -0.5 * (beyond / deviation) ** 2
        else:
            prior = np.zeros(1)
        self._bias, self._beyond = bias[:, None, None], beyond[None, None, :]
        self._error = (scale * ERROR_FACTOR**spread)[None, :, None]
        self._log_weight: Floats = -0.5 * ((self._bias / BIAS) ** 2 + (spread**2)[None, :, None]) + prior

    def tell(self, row: int, measured_gib: float | None) -> None:
        """Learn the peak of allocated memory that a trial of `row` measured; None if it ran out of memory."""
        room = self._room[row]
        if measured_gib is None:
            total = np.hypot(self._error, self._own)
            self._log_weight = self._log_weight + log_ndtr((self._bias + self._beyond - room) / total)
            return
        ratio = np.log(measured_gib / self._predicted_gib[row])
        of_ratio = -0.5 * ((ratio - self._bias) / self._error) ** 2 - np.log(self._error)
        fits = log_ndtr((room - ratio - self._beyond) / self._own) if self._beyond.size > 1 else 0.0
        self._log_weight = self._log_weight + of_ratio + fits

    def probabilities(self) -> Floats:
        """Return P(fits) of every row."""
        weight = np.exp(self._log_weight - self._log_weight.max())
        centre = np.broadcast_to(self._bias + self._beyond, weight.shape)
        fits = np.zeros_like(_ROOMS)
        # It depends on a row's room alone, and on the sum of both: a curve is cheaper than the posterior at each row.
        for number, error in enumerate(np.hypot(self._error, self._own).ravel()):
            centres, index = np.unique(np.round(centre[:, number] / _STEP), return_inverse=True)
            weights = np.bincount(index.ravel(), weight[:, number].ravel())
            fits += ndtr((_ROOMS[:, None] - centres * _STEP) / error) @ weights
        probability: Floats = np.interp(self._room, _ROOMS, fits / weight.sum())
        return probability


def fit_probabilities(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Floats:
    """P(fits) of every row of a table of valid layouts, before any trial."""
    return Feasibility(table, workload, cluster).probabilities()
