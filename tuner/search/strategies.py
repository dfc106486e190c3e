"""The strategies by their names in a sweep file."""

import pandas as pd

from tuner.predict.calibration import Calibration
from tuner.predict.feasibility import Feasibility
from tuner.predict.implementation import implementation_of
from tuner.predict.time.step import step_time_ms
from tuner.search import optuna_rows
from tuner.search.optuna_rows import OptunaRows
from tuner.search.predicted_rows import PredictedRows
from tuner.search.problem import Problem
from tuner.search.strategy import GridRows, RandomRows, Strategy


def strategy_of(problem: Problem, table: pd.DataFrame, calibration: Calibration | None = None) -> Strategy:
    """Return the strategy that chooses rows of the table once the queue of proposed layouts is empty."""
    match problem.sampler:
        case "random":
            return RandomRows(problem.seed)
        case "grid":
            return GridRows()
        case "tpe":
            return OptunaRows(table, optuna_rows.tpe, problem.seed)
        case "gp":
            return OptunaRows(table, optuna_rows.gaussian_process, problem.seed)
        case "predicted":
            workload, cluster = problem.workload, problem.cluster
            implementation = implementation_of(cluster)
            predicted_ms = step_time_ms(table, workload, cluster, implementation, calibration)
            feasibility = Feasibility(table, workload, cluster)
            return PredictedRows(table, predicted_ms, feasibility, problem.measurement)
