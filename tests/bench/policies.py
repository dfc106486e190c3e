"""Search policies over a table of layouts, for the replay: each chooses the row to measure next."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tests.bench.problems import MeasuredProblem
from tuner.core.columns import Floats
from tuner.predict.feasibility import Feasibility
from tuner.predict.time.step import step_time_ms
from tuner.search import optuna_rows
from tuner.search.optuna_rows import OptunaRows
from tuner.search.predicted_rows import PredictedRows
from tuner.search.strategy import Mask, RandomRows, Strategy


class Ours(PredictedRows):
    """What a sweep does: it takes the rows of its queue that promise something, and then those of its strategy."""

    def __init__(self, problem: MeasuredProblem, seed: int) -> None:
        table, workload, cluster = problem.table, problem.workload, problem.cluster
        # Every layout of a recorded group ran, and its source does not say with how much memory.
        feasibility = None if problem.peak_gib is None else Feasibility(table, workload, cluster)
        # vTrain measured layers without Transformer Engine, and so do the landscapes on CPU ranks.
        super().__init__(table, step_time_ms(table, workload, cluster, "torch"), feasibility)
        self._queue = problem.queue

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        for place, row in enumerate(self._queue):
            if available[row] and (place == 0 or self.promises(row, available)):
                return row
        return super().choose(available, number, in_flight)


class InOrder(Strategy):
    """Takes the rows in an order that is fixed before the first trial."""

    def __init__(self, order: NDArray[np.intp]) -> None:
        self._order = order

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        return int(next(row for row in self._order if available[row]))


def folk_rule(problem: MeasuredProblem, seed: int) -> InOrder:
    """Order rows by least model parallelism, TP before PP, then by largest micro-batch, and then by fewest extras."""
    table = problem.table
    tp, pp, cp, micro = (table[knob].to_numpy() for knob in ("tp", "pp", "cp", "micro_batch_size"))
    plain = [table[knob].to_numpy() for knob in ("ep", "vpp", "sp")]
    recompute = (table["recompute_granularity"] != "none").to_numpy()
    return InOrder(np.lexsort((*plain, recompute, -micro, pp, cp, tp * pp * cp)))


def random_rows(problem: MeasuredProblem, seed: int) -> RandomRows:
    """Return the policy that draws any row."""
    return RandomRows(seed)


def tpe(problem: MeasuredProblem, seed: int) -> OptunaRows:
    """Return Optuna's tree-structured Parzen estimator."""
    return OptunaRows(problem.table, optuna_rows.tpe, seed)


def gaussian_process(problem: MeasuredProblem, seed: int) -> OptunaRows:
    """Return Optuna's Gaussian process."""
    return OptunaRows(problem.table, optuna_rows.gaussian_process, seed)


POLICIES: Final[Mapping[str, Callable[[MeasuredProblem, int], Strategy]]] = {
    "ours": Ours,
    "folk": folk_rule,
    "random": random_rows,
    "tpe": tpe,
    "gp": gaussian_process,
}
SEEDLESS: Final = frozenset({"ours", "folk"})
"""The policies that do not depend on a seed."""


def spearman(left: Floats, right: Floats) -> float:
    """Return the rank correlation of two arrays of one shape."""
    return float(pd.Series(left).rank().corr(pd.Series(right).rank()))
