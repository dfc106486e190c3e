"""The sampler suggests rows of the table: valid, never twice, near the best, and the same after a resume."""

from collections import Counter

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution

from tests.replay import sweep_of, table_of
from tuner.layout import DEFAULTS, Layout
from tuner.search.sampler import (
    PredictedRows,
    RandomRows,
    Strategy,
    TableSampler,
    distributions,
    find_row,
    layout_at,
)
from tuner.sweep import with_row

TABLE = table_of(sweep_of())


@given(st.integers(0, len(TABLE) - 1))
def test_a_layout_is_found_where_it_stands(row: int) -> None:
    assert find_row(TABLE, layout_at(TABLE, row)) == row


def test_a_layout_outside_the_table_is_not_found() -> None:
    assert find_row(TABLE, Layout(tp=2, cp=2)) is None


def test_the_knobs_that_vary_are_the_parameters() -> None:
    found = distributions(TABLE)
    assert found["tp"] == CategoricalDistribution([1, 2, 4])
    assert found["recompute_granularity"] == CategoricalDistribution(["full", "none"])
    assert "cp" not in found
    earlier = distributions(TABLE, [Layout(tp=8, cp=2)])
    assert earlier["tp"] == CategoricalDistribution([1, 2, 4, 8])
    assert earlier["cp"] == CategoricalDistribution([1, 2])


def random_sampler(seed: int, table: pd.DataFrame = TABLE) -> TableSampler:
    return TableSampler(table, RandomRows(seed))


PREDICTED_MS = np.arange(len(TABLE), 0, -1, dtype=np.float64)
"""The later in the table, the faster."""


@given(st.booleans(), st.integers(0, 2**32), st.sets(st.integers(0, len(TABLE) - 1)))
def test_only_rows_that_are_left_are_chosen(predicted: bool, seed: int, gone: set[int]) -> None:
    sampler = TableSampler(TABLE, PredictedRows(TABLE, PREDICTED_MS) if predicted else RandomRows(seed))
    mask = np.isin(np.arange(len(TABLE)), list(gone))
    assert sampler.exclude(mask) == len(gone)
    assert sampler.exclude(mask) == 0
    assert sampler.remaining == len(TABLE) - len(gone)
    for number in range(3):
        if sampler.remaining:
            row = sampler.choose(number)
            assert row not in gone
            assert sampler.is_available(row)
            sampler.tell(row, 10.0 + number)


@pytest.mark.parametrize("strategy", [RandomRows(3), PredictedRows(TABLE, PREDICTED_MS)])
def test_every_row_is_chosen_once_and_then_none(strategy: Strategy) -> None:
    sampler = TableSampler(TABLE, strategy)
    chosen = []
    for number in range(len(TABLE)):
        chosen.append(sampler.choose(number))
        sampler.tell(chosen[-1], 100.0 + chosen[-1])
        sampler.exclude_row(chosen[-1])
    assert sorted(chosen) == list(range(len(TABLE)))
    with pytest.raises(ValueError, match="every row is tried or pruned"):
        sampler.choose(len(TABLE))


def test_a_trials_draw_depends_on_its_number_and_the_seed_alone() -> None:
    one, other = random_sampler(7), random_sampler(7)
    forwards = [one.choose(number) for number in range(20)]
    backwards = [other.choose(number) for number in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [random_sampler(8).choose(number) for number in range(20)]


def test_random_draws_come_from_everywhere() -> None:
    sampler = random_sampler(0)
    drawn = Counter(sampler.choose(number) for number in range(40 * len(TABLE)))
    assert len(drawn) == len(TABLE)
    assert max(drawn.values()) < 3 * 40


def test_without_a_measurement_the_best_predicted_row_comes_first() -> None:
    sampler = TableSampler(TABLE, PredictedRows(TABLE, PREDICTED_MS))
    assert sampler.choose(0) == len(TABLE) - 1


def test_measurements_that_contradict_the_prediction_turn_the_search_around() -> None:
    """In truth micro-batches of 4 are twice as fast; predicted, they are a little slower."""
    fast = (TABLE["micro_batch_size"] == 4).to_numpy()
    sampler = TableSampler(TABLE, PredictedRows(TABLE, np.where(fast, 101.0, 100.0)))
    chosen = []
    for number in range(len(TABLE)):
        row = sampler.choose(number)
        sampler.tell(row, 50.0 if fast[row] else 100.0)
        sampler.exclude_row(row)
        chosen.append(bool(fast[row]))
    first = chosen.index(True)
    assert 0 < first < len(TABLE) // 4
    assert all(chosen[first : first + int(fast.sum())])


def test_optuna_gets_whole_rows_and_one_knob_alone_is_refused() -> None:
    sampler = random_sampler(1)
    study = optuna.create_study(sampler=sampler)
    trial = study.ask(dict(sampler.space))
    layout = Layout(**{**DEFAULTS, **trial.params})
    assert find_row(TABLE, layout) == sampler.choose(trial.number)
    with pytest.raises(ValueError, match="'lr' is no knob of the table"):
        trial.suggest_float("lr", 0, 1)
    with pytest.raises(ValueError, match="a row is sampled whole"):
        sampler.sample_independent(study, study.trials[0], "tp", FloatDistribution(0, 1))


def test_a_table_of_one_row_has_no_parameters_and_one_draw() -> None:
    table = TABLE.iloc[[4]].reset_index(drop=True)
    sampler = random_sampler(0, table)
    assert sampler.space == {}
    assert sampler.choose(0) == 0


def test_a_row_outside_the_table_is_appended_once_and_keeps_the_others() -> None:
    outside = Layout(tp=1, cp=2, recompute_granularity="selective", recompute_modules="core_attn")
    joined = with_row(TABLE, outside)
    assert len(joined) == len(TABLE) + 1
    assert layout_at(joined, len(TABLE)) == outside
    assert [layout_at(joined, row) for row in range(3)] == [layout_at(TABLE, row) for row in range(3)]
    assert with_row(joined, outside) is joined
    inside = layout_at(TABLE, 2)
    assert with_row(TABLE, inside) is TABLE
    kinds = joined.dtypes[["tp", "sp", "micro_batch_size"]]
    pd.testing.assert_series_equal(kinds, TABLE.dtypes[["tp", "sp", "micro_batch_size"]])
