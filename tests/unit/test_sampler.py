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
from tuner.layout import DEFAULTS, KNOBS, Layout
from tuner.search.sampler import TableSampler, distributions, find_row, layout_at
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


@given(st.integers(0, 2**32), st.sets(st.integers(0, len(TABLE) - 1)), st.integers(0, len(TABLE) - 1))
def test_only_rows_that_are_left_are_chosen(seed: int, gone: set[int], best: int) -> None:
    sampler = TableSampler(TABLE, seed)
    mask = np.isin(np.arange(len(TABLE)), list(gone))
    assert sampler.exclude(mask) == len(gone)
    assert sampler.exclude(mask) == 0
    assert sampler.remaining == len(TABLE) - len(gone)
    sampler.note_best(best)
    for number in range(5):
        if sampler.remaining:
            row = sampler.choose(number)
            assert row not in gone
            assert sampler.is_available(row)


def test_every_row_is_chosen_once_and_then_none() -> None:
    sampler = TableSampler(TABLE, 3)
    chosen = []
    for number in range(len(TABLE)):
        chosen.append(sampler.choose(number))
        sampler.note_best(chosen[0])
        sampler.exclude_row(chosen[-1])
    assert sorted(chosen) == list(range(len(TABLE)))
    with pytest.raises(ValueError, match="every row is tried or pruned"):
        sampler.choose(len(TABLE))


def test_a_trials_draw_depends_on_its_number_and_the_seed_alone() -> None:
    one, other = TableSampler(TABLE, 7), TableSampler(TABLE, 7)
    forwards = [one.choose(number) for number in range(20)]
    backwards = [other.choose(number) for number in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [TableSampler(TABLE, 8).choose(number) for number in range(20)]


def test_half_the_draws_are_neighbours_of_the_best_and_the_rest_come_from_everywhere() -> None:
    sampler = TableSampler(TABLE, 0)
    best = find_row(TABLE, Layout(tp=2, pp=1, micro_batch_size=2))
    assert best is not None
    sampler.exclude_row(best)
    sampler.note_best(best)
    drawn = Counter(sampler.choose(number) for number in range(2000))
    differing = {
        row: sum(
            getattr(layout_at(TABLE, row), knob) != getattr(layout_at(TABLE, best), knob) for knob in KNOBS
        )
        for row in drawn
    }
    near = sum(count for row, count in drawn.items() if differing[row] == 1)
    neighbours = sum(distance == 1 for distance in differing.values())
    expected = 0.5 + 0.5 * neighbours / (len(TABLE) - 1)
    assert abs(near / 2000 - expected) < 0.05
    assert len(drawn) == len(TABLE) - 1


def test_optuna_gets_whole_rows_and_one_knob_alone_is_refused() -> None:
    sampler = TableSampler(TABLE, 1)
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
    sampler = TableSampler(table, 0)
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
