"""Search policies over a table of layouts, for the replay: each says which row to measure next."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tests.bench.problems import Problem
from tuner.predict.feasibility import Feasibility
from tuner.predict.time.step import step_time_ms
from tuner.search import optuna_rows
from tuner.search.optuna_rows import OptunaRows
from tuner.search.predicted_rows import PredictedRows
from tuner.search.strategy import Mask, RandomRows, Strategy


class Ours(PredictedRows):
    """The sweep's own: its queue while that promises something, then predicted and corrected rows."""

    def __init__(self, problem: Problem, seed: int) -> None:
        table, workload, cluster = problem.table, problem.workload, problem.cluster
        # Of the recorded groups every layout ran, and nobody says in how much memory.
        feasibility = None if problem.peak_gib is None else Feasibility(table, workload, cluster)
        # vTrain's measurements are of layers without Transformer Engine, as those on CPU are.
        super().__init__(table, step_time_ms(table, workload, cluster, "torch"), feasibility)
        self._queue = problem.queue

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        for place, row in enumerate(self._queue):
            if available[row] and (place == 0 or self.promises(row, available)):
                return row
        return super().choose(available, number, in_flight)


class InOrder(Strategy):
    """Rows in an order that is settled before the first trial."""

    def __init__(self, order: NDArray[np.intp]) -> None:
        self._order = order

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        return int(next(row for row in self._order if available[row]))


def folk_rule(problem: Problem, seed: int) -> InOrder:
    """The least model parallelism that fits, TP before PP, then the largest micro-batch; then the plainest."""
    table = problem.table
    tp, pp, cp, micro = (table[knob].to_numpy() for knob in ("tp", "pp", "cp", "micro_batch_size"))
    plain = [table[knob].to_numpy() for knob in ("ep", "vpp", "sp")]
    recompute = (table["recompute_granularity"] != "none").to_numpy()
    return InOrder(np.lexsort((*plain, recompute, -micro, pp, cp, tp * pp * cp)))


def random_rows(problem: Problem, seed: int) -> RandomRows:
    """Any row."""
    return RandomRows(seed)


def tpe(problem: Problem, seed: int) -> OptunaRows:
    """Optuna's tree-structured Parzen estimator."""
    return OptunaRows(problem.table, optuna_rows.tpe, seed)


def gaussian_process(problem: Problem, seed: int) -> OptunaRows:
    """Optuna's Gaussian process."""
    return OptunaRows(problem.table, optuna_rows.gaussian_process, seed)


POLICIES: Final[Mapping[str, Callable[[Problem, int], Strategy]]] = {
    "ours": Ours,
    "folk": folk_rule,
    "random": random_rows,
    "tpe": tpe,
    "gp": gaussian_process,
}
SEEDLESS: Final = frozenset({"ours", "folk"})
"""Policies that draw nothing at random."""


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The correlation of ranks."""
    return float(pd.Series(one).rank().corr(pd.Series(other).rank()))
