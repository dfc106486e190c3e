"""Tuning problems of which every layout was tried: the recorded groups, and the landscapes measured here."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tests.bench.landscape import Landscape, landscapes
from tests.bench.recorded import STEP_TIMES, Group, groups
from tuner.core.cluster import Cluster
from tuner.core.workload import Workload
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.space.heuristics import seeds
from tuner.space.table import find_row
from tuner.sweep.loop import queue_of


@dataclass(frozen=True, slots=True)
class Problem:
    """A table of layouts with what each of them measured."""

    name: str
    workload: Workload
    cluster: Cluster
    table: pd.DataFrame
    step_times_ms: NDArray[np.float64]
    """Shape [layouts, repeats]; NaN where the layout ran out of memory; likewise the next."""
    peak_gib: NDArray[np.float64] | None
    """Measured; None where nobody recorded it."""
    queue: tuple[int, ...] = ()
    """Rows that a sweep would try first: the baseline, and the seeds."""

    @property
    def step_time_ms(self) -> NDArray[np.float64]:
        """Each layout's: the median of its repeats."""
        middle: NDArray[np.float64] = np.median(self.step_times_ms, axis=1)
        return middle

    @property
    def ran(self) -> NDArray[np.bool_]:
        """The layouts that fit."""
        return np.isfinite(self.step_time_ms)

    @property
    def best(self) -> int:
        """The row of the fastest layout."""
        return int(np.nanargmin(self.step_time_ms))


def recorded(rows: int = 1) -> list[Problem]:
    """The recorded groups of `rows` rows or more; empty where they are not at hand."""
    return [of_group(group) for group in groups(rows=rows)] if STEP_TIMES.exists() else []


def of_group(group: Group) -> Problem:
    """A recorded group: one measurement a layout, each of which ran."""
    return Problem(
        group.name, group.workload, group.cluster, group.table, group.measured_ms[:, np.newaxis], None
    )


def measured() -> list[Problem]:
    """The landscapes, whole."""
    return [_of_landscape(landscape) for landscape in landscapes()]


def _of_landscape(landscape: Landscape) -> Problem:
    sweep = landscape.sweep
    return Problem(
        sweep.name,
        sweep.workload,
        sweep.cluster,
        landscape.table,
        landscape.step_time_ms,
        landscape.peak_gib,
    )


def searched(problem: Problem) -> Problem:
    """A landscape as a sweep without a stated baseline meets it: what cannot fit left out, seeds in front."""
    fits = fit_probabilities(problem.table, problem.workload, problem.cluster) >= MIN_FIT
    table = problem.table[fits].reset_index(drop=True)
    queue = (
        find_row(table, layout)
        for layout, _ in queue_of(None, seeds(problem.workload, problem.cluster, table))
    )
    return Problem(
        problem.name,
        problem.workload,
        problem.cluster,
        table,
        problem.step_times_ms[fits],
        None if problem.peak_gib is None else problem.peak_gib[fits],
        tuple(row for row in queue if row is not None),
    )


def problems() -> Iterator[Problem]:
    """All of them."""
    yield from recorded()
    yield from measured()
