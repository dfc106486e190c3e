"""Strategies choose rows that are left, each once, and learn from every trial that ended."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from tests.replay import sweep_of, table_of
from tests.trials import CLUSTER
from tuner.core.columns import Bools
from tuner.predict.feasibility import Feasibility
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.search import optuna_rows
from tuner.search.observation import Observation
from tuner.search.optuna_rows import OptunaRows
from tuner.search.predicted_rows import PredictedRows
from tuner.search.strategy import GridRows, RandomRows, Strategy

TABLE = table_of(sweep_of())
PREDICTED_MS = np.arange(len(TABLE), 0, -1, dtype=np.float64)
"""Rows further down the table are predicted to be faster."""
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "random": lambda: RandomRows(3),
    "grid": GridRows,
    "tpe": lambda: OptunaRows(TABLE, optuna_rows.tpe, 3),
    "predicted": lambda: PredictedRows(TABLE, PREDICTED_MS),
}


def measured(step_time_ms: float) -> Observation:
    return Observation(state=TrialState.COMPLETE, step_time_ms=step_time_ms)


def all_rows() -> Bools:
    return np.ones(len(TABLE), dtype=np.bool_)


def searched(
    strategy: Strategy, available: Bools, trials: int, step_time_ms: Callable[[int], float]
) -> list[int]:
    """The rows that a strategy chooses in turn, each measured before the next is chosen."""
    rows = []
    for number in range(trials):
        rows.append(strategy.choose(available, number))
        assert available[rows[-1]]
        available[rows[-1]] = False
        strategy.tell(rows[-1], measured(step_time_ms(rows[-1])))
    return rows


@settings(max_examples=40)
@given(st.booleans(), st.integers(0, 2**32), st.sets(st.integers(0, len(TABLE) - 1), max_size=len(TABLE) - 3))
def test_only_rows_that_are_left_are_chosen(predicted: bool, seed: int, excluded: set[int]) -> None:
    strategy = PredictedRows(TABLE, PREDICTED_MS) if predicted else RandomRows(seed)
    available = ~np.isin(np.arange(len(TABLE)), list(excluded))
    assert excluded.isdisjoint(searched(strategy, available, 3, lambda row: 10.0 + row))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_row_is_chosen_once(name: str) -> None:
    rows = searched(STRATEGIES[name](), all_rows(), len(TABLE), lambda row: 100.0 + row)
    assert sorted(rows) == list(range(len(TABLE)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_row_is_chosen_twice_while_trials_are_in_flight(name: str) -> None:
    strategy, available, in_flight = STRATEGIES[name](), all_rows(), list[int]()

    def choose(number: int) -> None:
        row = strategy.choose(available, number, tuple(in_flight))
        assert available[row]
        available[row] = False
        in_flight.append(row)

    for number in range(12):
        choose(number)
    for row in in_flight[::2]:
        strategy.tell(row, measured(100.0 + row))
        in_flight.remove(row)
    for number in range(12, 24):
        choose(number)
    assert available.sum() == len(TABLE) - 24


def test_the_draw_of_a_trial_depends_on_nothing_but_its_number_and_the_seed() -> None:
    everything = all_rows()
    one, other = RandomRows(7), RandomRows(7)
    forwards = [one.choose(everything, number) for number in range(20)]
    backwards = [other.choose(everything, number) for number in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [RandomRows(8).choose(everything, number) for number in range(20)]


def test_random_draws_come_from_all_rows() -> None:
    everything = all_rows()
    drawn = Counter(RandomRows(0).choose(everything, number) for number in range(40 * len(TABLE)))
    assert len(drawn) == len(TABLE)
    assert max(drawn.values()) < 3 * 40


def test_without_a_measurement_the_best_predicted_row_comes_first() -> None:
    assert PredictedRows(TABLE, PREDICTED_MS).choose(all_rows(), 0) == len(TABLE) - 1


def test_measurements_that_contradict_the_prediction_redirect_the_search() -> None:
    """Layouts with micro-batches of 4 are predicted to be a little slower and measure half the step time."""
    is_fast = (TABLE["micro_batch_size"] == 4).to_numpy()
    strategy = PredictedRows(TABLE, np.where(is_fast, 101.0, 100.0))
    rows = searched(strategy, all_rows(), len(TABLE), lambda row: 50.0 if is_fast[row] else 100.0)
    chosen = [bool(is_fast[row]) for row in rows]
    first = chosen.index(True)
    assert 0 < first < len(TABLE) // 4
    assert np.mean(chosen[first : first + int(is_fast.sum())]) > 0.75


def test_the_grid_strategy_follows_the_order_of_the_table() -> None:
    assert searched(GridRows(), all_rows(), 5, float) == list(range(5))


def test_trials_that_ran_out_of_memory_put_off_the_rows_that_need_about_as_much() -> None:
    sweep = sweep_of()
    on_cpu = replace(CLUSTER, device="cpu")  # CPU ranks hold no memory besides what they allocate
    peaks = peak_gib(TABLE, sweep.workload, on_cpu, implementation_of(on_cpu))
    limit_gib = float(np.quantile(peaks, 0.5))
    cluster = replace(on_cpu, gpu=replace(CLUSTER.gpu, memory_gib=limit_gib))
    before = Feasibility(TABLE, sweep.workload, cluster)
    boundary = int(np.abs(before.probabilities() - 0.6).argmin())
    rows = PredictedRows(TABLE, np.where(np.arange(len(TABLE)) == boundary, 10.0, 100.0), before)
    everything = all_rows()
    assert rows.choose(everything, 0) == boundary, "the boundary is predicted to win, so it is tried"
    everything[boundary] = False
    shares = Feasibility(TABLE, sweep.workload, cluster).probabilities()
    near = int(np.where(everything & (shares < 0.9), shares, 0.0).argmax())
    rows.tell(boundary, Observation(state=TrialState.PRUNED, out_of_memory=True))
    assert before.probabilities()[near] < shares[near]
    after = before.probabilities()
    assert after[rows.choose(everything, 1)] == after[everything].max()


def test_a_trial_that_was_stopped_as_too_slow_teaches_a_bound_and_its_peak_of_memory() -> None:
    workload, row, other = sweep_of().workload, 7, 8
    peak = float(peak_gib(TABLE, workload, CLUSTER)[row]) * 1.1
    expected, learning = (Feasibility(TABLE, workload, CLUSTER) for _ in range(2))
    expected.tell(row, peak)
    rows = PredictedRows(TABLE, np.full(len(TABLE), 100.0), learning)
    rows.tell(0, measured(100.0))
    left = np.isin(np.arange(len(TABLE)), [row, other])
    rows.tell(row, Observation(state=TrialState.PRUNED, slower_than_ms=300.0, peak_gib=peak))
    assert rows.choose(left, 2) == other
    assert np.array_equal(learning.probabilities(), expected.probabilities())


def test_a_proposed_row_is_worth_a_trial_if_it_promises_about_as_much_as_the_best() -> None:
    predicted_ms = np.where(np.arange(len(TABLE)) == 3, 99.0, 100.0)
    predicted_ms[5] = 300.0
    strategy, available = PredictedRows(TABLE, predicted_ms), all_rows()
    available[0] = False
    strategy.tell(0, measured(100.0))
    assert strategy.promises(3, available)
    assert not strategy.promises(5, available)
    assert RandomRows(0).promises(5, available)


def test_a_table_of_one_row_leaves_one_choice() -> None:
    table = TABLE.iloc[[4]].reset_index(drop=True)
    for strategy in (RandomRows(0), OptunaRows(table, optuna_rows.tpe, 0), PredictedRows(table, np.ones(1))):
        assert strategy.choose(np.ones(1, dtype=np.bool_), 0) == 0
