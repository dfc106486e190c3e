"""The sampler suggests rows of the table: valid ones, each once, and those that promise most first."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from tests.replay import sweep_of, table_of
from tests.trials import CLUSTER
from tuner.core.layout import DEFAULTS, Layout
from tuner.predict.feasibility import Feasibility
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import peak_gib
from tuner.search import optuna_rows
from tuner.search.observation import Observation
from tuner.search.optuna_rows import OptunaRows
from tuner.search.predicted_rows import PredictedRows
from tuner.search.sampler import TableSampler, distributions
from tuner.search.strategy import GridRows, RandomRows, Strategy
from tuner.space.table import find_row

TABLE = table_of(sweep_of())


def test_the_knobs_that_vary_are_the_parameters() -> None:
    space = distributions(TABLE)
    assert space["tp"] == CategoricalDistribution([1, 2, 4])
    assert space["recompute_granularity"] == CategoricalDistribution(["full", "none"])
    assert "cp" not in space
    earlier = distributions(TABLE, [Layout(tp=8, cp=2)])
    assert earlier["tp"] == CategoricalDistribution([1, 2, 4, 8])
    assert earlier["cp"] == CategoricalDistribution([1, 2])


def measured(step_time_ms: float) -> Observation:
    return Observation(state=TrialState.COMPLETE, step_time_ms=step_time_ms)


def random_sampler(seed: int, table: pd.DataFrame = TABLE) -> TableSampler:
    return TableSampler(table, RandomRows(seed))


PREDICTED_MS = np.arange(len(TABLE), 0, -1, dtype=np.float64)
"""Rows further down the table are predicted to be faster."""


@settings(max_examples=40)
@given(st.booleans(), st.integers(0, 2**32), st.sets(st.integers(0, len(TABLE) - 1)))
def test_only_rows_that_are_left_are_chosen(predicted: bool, seed: int, excluded: set[int]) -> None:
    sampler = TableSampler(TABLE, PredictedRows(TABLE, PREDICTED_MS) if predicted else RandomRows(seed))
    mask = np.isin(np.arange(len(TABLE)), list(excluded))
    assert sampler.exclude(mask) == len(excluded)
    assert sampler.exclude(mask) == 0
    assert sampler.remaining == len(TABLE) - len(excluded)
    for number in range(3):
        if sampler.remaining:
            row = sampler.choose(number)
            assert row not in excluded
            assert not sampler.is_available(row)
            sampler.tell(number, measured(10.0 + number))


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "random": lambda: RandomRows(3),
    "grid": GridRows,
    "tpe": lambda: OptunaRows(TABLE, optuna_rows.tpe, 3),
    "predicted": lambda: PredictedRows(TABLE, PREDICTED_MS),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_row_is_chosen_once_and_then_none(name: str) -> None:
    sampler = TableSampler(TABLE, STRATEGIES[name]())
    chosen = []
    for number in range(len(TABLE)):
        chosen.append(sampler.choose(number))
        sampler.tell(number, measured(100.0 + chosen[-1]))
    assert sorted(chosen) == list(range(len(TABLE)))
    with pytest.raises(ValueError, match="every row is tried or pruned"):
        sampler.choose(len(TABLE))


def test_the_draw_of_a_trial_depends_on_nothing_but_its_number_and_the_seed() -> None:
    everything = np.ones(len(TABLE), dtype=np.bool_)
    one, other = RandomRows(7), RandomRows(7)
    forwards = [one.choose(everything, number) for number in range(20)]
    backwards = [other.choose(everything, number) for number in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [RandomRows(8).choose(everything, number) for number in range(20)]


def test_random_draws_come_from_all_rows() -> None:
    everything = np.ones(len(TABLE), dtype=np.bool_)
    drawn = Counter(RandomRows(0).choose(everything, number) for number in range(40 * len(TABLE)))
    assert len(drawn) == len(TABLE)
    assert max(drawn.values()) < 3 * 40


def test_without_a_measurement_the_best_predicted_row_comes_first() -> None:
    sampler = TableSampler(TABLE, PredictedRows(TABLE, PREDICTED_MS))
    assert sampler.choose(0) == len(TABLE) - 1


def test_measurements_that_contradict_the_prediction_redirect_the_search() -> None:
    """Layouts with micro-batches of 4 are predicted to be a little slower and measure half the step time."""
    fast = (TABLE["micro_batch_size"] == 4).to_numpy()
    sampler = TableSampler(TABLE, PredictedRows(TABLE, np.where(fast, 101.0, 100.0)))
    chosen = []
    for number in range(len(TABLE)):
        row = sampler.choose(number)
        sampler.tell(number, measured(50.0 if fast[row] else 100.0))
        chosen.append(bool(fast[row]))
    first = chosen.index(True)
    assert 0 < first < len(TABLE) // 4
    assert np.mean(chosen[first : first + int(fast.sum())]) > 0.75


def test_optuna_gets_whole_rows_and_one_knob_alone_is_refused() -> None:
    sampler = random_sampler(1)
    study = optuna.create_study(sampler=sampler)
    trial = study.ask(dict(sampler.space))
    layout = Layout(**{**DEFAULTS, **trial.params})
    row = find_row(TABLE, layout)
    assert row is not None
    assert not sampler.is_available(row)
    with pytest.raises(ValueError, match="'lr' is no knob of the table"):
        trial.suggest_float("lr", 0, 1)
    with pytest.raises(ValueError, match="a row is sampled as a whole"):
        sampler.sample_independent(study, study.trials[0], "tp", FloatDistribution(0, 1))


def test_the_grid_strategy_follows_the_order_of_the_table() -> None:
    sampler = TableSampler(TABLE, GridRows())
    assert [sampler.choose(number) for number in range(5)] == list(range(5))


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_row_is_chosen_twice_while_trials_are_in_flight(name: str) -> None:
    sampler = TableSampler(TABLE, STRATEGIES[name]())
    asked = [sampler.choose(number) for number in range(12)]
    for number in range(0, 12, 2):
        sampler.tell(number, measured(100.0 + number))
    asked += [sampler.choose(number) for number in range(12, 24)]
    assert len(set(asked)) == 24


@pytest.mark.parametrize("name", STRATEGIES)
def test_four_threads_measure_every_row_once(name: str) -> None:
    sampler = TableSampler(TABLE, STRATEGIES[name]())
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        for knob, distribution in sampler.space.items():
            assert isinstance(distribution, CategoricalDistribution)
            trial.suggest_categorical(knob, distribution.choices)
        row = find_row(TABLE, Layout(**{**DEFAULTS, **trial.params}))
        assert row is not None
        if trial.number % 7 == 3:
            raise optuna.TrialPruned
        return float(PREDICTED_MS[row])

    study.optimize(objective, n_trials=len(TABLE), n_jobs=4)
    params = [tuple(trial.params.items()) for trial in study.trials]
    assert len(set(params)) == len(TABLE)
    assert sampler.remaining == 0


def test_a_result_that_optuna_is_told_reaches_the_strategy_once() -> None:
    sampler = TableSampler(TABLE, PredictedRows(TABLE, PREDICTED_MS))
    study = optuna.create_study(sampler=sampler)
    trial = study.ask(dict(sampler.space))
    assert sampler.certainty() is None
    study.tell(trial, 100.0)
    first = sampler.certainty()
    assert first is not None
    sampler.tell(trial.number, measured(1.0))
    again = sampler.certainty()
    assert again is not None
    assert np.array_equal(again.losses, first.losses)


def test_trials_that_ran_out_of_memory_put_off_the_rows_that_need_about_as_much() -> None:
    sweep = sweep_of()
    on_cpu = replace(CLUSTER, device="cpu")  # CPU ranks hold no memory besides what they allocate
    peaks = peak_gib(TABLE, sweep.workload, on_cpu, implementation_of(on_cpu))
    limit_gib = float(np.quantile(peaks, 0.5))
    cluster = replace(on_cpu, gpu=replace(CLUSTER.gpu, memory_gib=limit_gib))
    before = Feasibility(TABLE, sweep.workload, cluster)
    boundary = int(np.abs(before.probabilities() - 0.6).argmin())
    rows = PredictedRows(TABLE, np.where(np.arange(len(TABLE)) == boundary, 10.0, 100.0), before)
    everything = np.ones(len(TABLE), dtype=np.bool_)
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
    predicted = np.where(np.arange(len(TABLE)) == 3, 99.0, 100.0)
    predicted[5] = 300.0
    sampler = TableSampler(TABLE, PredictedRows(TABLE, predicted))
    sampler.take(0, 0)
    sampler.tell(0, measured(100.0))
    assert sampler.promises(3)
    assert not sampler.promises(5)
    assert not sampler.promises(0), "it was measured"
    assert TableSampler(TABLE, RandomRows(0)).promises(5)


def test_a_table_of_one_row_has_no_parameters_and_one_choice() -> None:
    table = TABLE.iloc[[4]].reset_index(drop=True)
    sampler = random_sampler(0, table)
    assert sampler.space == {}
    assert sampler.choose(0) == 0
