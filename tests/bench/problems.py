"""Tuning problems of which every layout was measured: the recorded groups, and the landscapes measured here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd

from tests.bench.landscape import Landscape, landscapes
from tests.bench.recorded import STEP_TIMES, Group, groups
from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Floats
from tuner.core.workload import Workload
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.space.heuristics import seeds
from tuner.space.table import find_row
from tuner.sweep.policy import queue_of


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredProblem:
    """A table of layouts with what each of them measured."""

    name: str
    workload: Workload
    cluster: Cluster
    table: pd.DataFrame
    """One row per layout, columns as KNOBS."""
    step_times_ms: Floats
    """The measured step times, of shape [layouts, repeats]; NaN for a layout that ran out of memory."""
    peak_gib: Floats | None = None
    """The measured peaks, of shape [layouts], NaN for a layout that ran out of memory; None if nobody recorded them."""
    queue: tuple[int, ...] = ()
    """The rows that a sweep would try first: the baseline, and then the seeds."""

    @property
    def step_time_ms(self) -> Floats:
        """The median of each layout's repeats, of shape [layouts]."""
        medians: Floats = np.median(self.step_times_ms, axis=1)
        return medians

    @property
    def ran(self) -> Bools:
        """Which layouts did not run out of memory, of shape [layouts]."""
        return np.isfinite(self.step_time_ms)

    @property
    def best(self) -> int:
        """The row of the fastest layout."""
        return int(np.nanargmin(self.step_time_ms))


def problems() -> Iterator[MeasuredProblem]:
    """Yield all recorded groups, and then all landscapes."""
    yield from recorded()
    yield from measured()


@cache
def recorded(rows: int = 1) -> tuple[MeasuredProblem, ...]:
    """Return the recorded groups of at least `rows` rows; none if the recording is not on this machine."""
    return tuple(of_group(group) for group in groups(rows=rows)) if STEP_TIMES.exists() else ()


def of_group(group: Group) -> MeasuredProblem:
    """Return a recorded group as a problem: it has one measurement per layout, and every layout ran."""
    return MeasuredProblem(
        name=group.name,
        workload=group.workload,
        cluster=group.cluster,
        table=group.table,
        step_times_ms=group.measured_ms[:, np.newaxis],
    )


@cache
def measured() -> tuple[MeasuredProblem, ...]:
    """Return the landscapes with all of their layouts."""
    return tuple(_of_landscape(landscape) for landscape in landscapes())


def _of_landscape(landscape: Landscape) -> MeasuredProblem:
    sweep = landscape.sweep
    return MeasuredProblem(
        name=sweep.name,
        workload=sweep.workload,
        cluster=sweep.cluster,
        table=landscape.table,
        step_times_ms=landscape.step_time_ms,
        peak_gib=landscape.peak_gib,
    )


def searched(problem: MeasuredProblem) -> MeasuredProblem:
    """Return a problem as a sweep without a stated baseline meets it: without what cannot fit, and with a queue."""
    may_fit = fit_probabilities(problem.table, problem.workload, problem.cluster) >= MIN_FIT
    table = problem.table[may_fit].reset_index(drop=True)
    queue = queue_of(None, seeds(problem.workload, problem.cluster, table))
    rows = (find_row(table, queued.layout) for queued in queue)
    return replace(
        problem,
        table=table,
        step_times_ms=problem.step_times_ms[may_fit],
        peak_gib=None if problem.peak_gib is None else problem.peak_gib[may_fit],
        queue=tuple(row for row in rows if row is not None),
    )
