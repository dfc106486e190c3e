"""The ranking of rows: the best predicted first, and then whatever the measurements suggest."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.problems import recorded
from tests.bench.recorded import LARGE_GROUP, STEP_TIMES
from tests.bench.replay import table
from tuner.core.layout import DEFAULTS, KNOBS
from tuner.search.encoding import encode
from tuner.search.ranking import Ranking

GRID = np.array([(tp, micro) for tp in range(4) for micro in range(5)], dtype=np.float64)


def measured(ranking: Ranking, truth_ms: np.ndarray, trials: int) -> list[int]:
    available = np.ones(len(truth_ms), dtype=np.bool_)
    rows = []
    for _ in range(trials):
        row = ranking.choose(available)
        available[row] = False
        ranking.tell(row, float(truth_ms[row]))
        rows.append(row)
    return rows


def test_the_best_predicted_row_comes_first() -> None:
    predicted = np.arange(20, 0, -1, dtype=np.float64)
    assert Ranking(GRID, predicted).choose(np.ones(20, dtype=np.bool_)) == 19


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_no_row_is_chosen_that_is_not_available(seed: int, trials: int) -> None:
    random = np.random.default_rng(seed)
    predicted, truth = random.uniform(1, 100, (2, 20))
    rows = measured(Ranking(GRID, predicted), truth, trials)
    assert len(set(rows)) == trials


def test_nothing_available_is_refused() -> None:
    with pytest.raises(ValueError, match="no row is available"):
        Ranking(GRID, np.ones(20)).choose(np.zeros(20, dtype=np.bool_))


def test_rows_in_flight_are_neither_taken_twice_nor_forgotten() -> None:
    """Three workers ask before the first of them tells: a row in flight makes its neighbours less interesting."""
    predicted = 100 + GRID[:, 0] + 10 * GRID[:, 1]
    ranking, available = Ranking(GRID, predicted), np.ones(20, dtype=np.bool_)
    ranking.tell(19, float(predicted[19]))
    flying: list[int] = []
    for _ in range(3):
        row = ranking.choose(available, flying)
        available[row] = False
        flying.append(row)
    assert len(set(flying)) == 3
    # Without believed values, the second choice expects the improvement of the first one again, right beside it.
    near = np.abs(GRID[flying[0]] - GRID[flying[1]]).sum()
    blind = np.ones(20, dtype=np.bool_)
    blind[flying[0]] = False
    assert near >= np.abs(GRID[flying[0]] - GRID[ranking.choose(blind)]).sum()


def test_a_bound_turns_the_search_away_as_a_slow_measurement_does() -> None:
    predicted = np.where(GRID[:, 0] == 0, 100.0, 120.0)
    ranking, available = Ranking(GRID, predicted), np.ones(20, dtype=np.bool_)
    ranking.tell(19, 120.0)
    available[19] = False
    first = ranking.choose(available)
    assert GRID[first, 0] == 0
    available[first] = False
    before, neighbour = ranking.expected_ms(np.arange(20)), ranking.choose(available)
    assert np.abs(GRID[neighbour] - GRID[first]).sum() == 1
    ranking.tell_slower(first, 400.0)
    assert np.abs(GRID[ranking.choose(available)] - GRID[first]).sum() > 2
    raised = ranking.expected_ms(np.arange(20)) / before
    assert raised[neighbour] > 2
    assert raised.argmax() == first


def test_with_bounds_alone_the_best_expected_row_comes_next() -> None:
    ranking, available = Ranking(GRID, np.full(20, 100.0)), np.ones(20, dtype=np.bool_)
    available[0] = False
    ranking.tell_slower(0, 300.0)
    row = ranking.choose(available)
    assert np.linalg.norm(GRID[row] - GRID[0]) == np.linalg.norm(GRID - GRID[0], axis=1).max()
    assert ranking.certainty(available) is None


def test_a_row_that_may_not_fit_is_tried_if_it_would_win_by_much() -> None:
    """Row 0 is measured. Row 1 surely fits and gains little; row 2 gains much if it fits."""
    features, everything = np.array([[0.0], [4.0], [-4.0]]), np.array([False, True, True])

    def chosen(fits: float) -> int:
        ranking = Ranking(features, np.array([100.0, 97.0, 50.0]), np.array([1.0, 1.0, fits]))
        ranking.tell(0, 100.0)
        return ranking.choose(everything)

    assert chosen(0.5) == 2
    assert chosen(0.02) == 1


def test_learnt_probabilities_replace_the_predicted_ones() -> None:
    ranking = Ranking(GRID, np.arange(1, 21, dtype=np.float64))
    ranking.refit(np.where(np.arange(20) < 5, 0.01, 1.0))
    assert ranking.choose(np.ones(20, dtype=np.bool_)) == 5


def test_the_best_is_certain_once_every_rival_is_measured_or_far() -> None:
    truth = 100 * 2.0 ** GRID[:, 1]
    ranking, available = Ranking(GRID, truth), np.ones(20, dtype=np.bool_)
    assert ranking.certainty(available) is None
    shares = []
    for _ in range(8):
        row = ranking.choose(available)
        available[row] = False
        ranking.tell(row, float(truth[row]))
        certainty = ranking.certainty(available)
        assert certainty is not None
        shares.append(certainty.within(0.01))
    assert shares[0] < 0.9
    assert shares[-1] > 0.98
    again = ranking.certainty(available)
    assert again is not None
    assert again.within(0.01) == shares[-1], (
        "the draws repeat, so a resumed sweep stops where it would have stopped"
    )


def test_with_every_row_measured_the_best_is_certain() -> None:
    ranking = Ranking(GRID, np.full(20, 100.0))
    ranking.tell(0, 50.0)
    certainty = ranking.certainty(np.zeros(20, dtype=np.bool_))
    assert certainty is not None
    assert certainty.gain(0.99) == 0


def test_expected_times_follow_the_measurements() -> None:
    ranking = Ranking(GRID, np.full(20, 100.0))
    for row in (0, 7, 19):
        ranking.tell(row, 200.0)
    assert ranking.expected_ms(np.arange(20)) == pytest.approx(200.0, rel=0.01)


def test_rows_like_one_that_disappointed_are_put_off() -> None:
    # The predictor ignores the first column, in which each step doubles the true step time.
    predicted = 100 + GRID[:, 0] * 0.1 + GRID[:, 1]
    truth = predicted * 2.0 ** (3 - GRID[:, 0])
    rows = measured(Ranking(GRID, predicted), truth, 6)
    assert rows[0] == 0
    assert truth[rows].min() < 1.1 * truth.min()


def test_knobs_become_doublings_switches_and_one_column_per_text() -> None:
    rows = pd.DataFrame([{**DEFAULTS, "tp": tp, "sp": tp > 1} for tp in (1, 2, 8)])
    rows["recompute_granularity"] = pd.Categorical(["none", "full", "none"])
    rows["recompute_num_layers"] = [0, 1, 0]
    assert list(rows.columns) == list(KNOBS)
    encoded = encode(rows)
    assert encoded.T.tolist() == [[0, 1, 3], [0, 1, 1], [1, 0, 1], [0, 1, 0], [-1, 0, -1]]


def test_a_table_of_one_row_is_encoded_too() -> None:
    assert encode(pd.DataFrame([DEFAULTS])).shape == (1, 1)


@pytest.mark.skipif(not STEP_TIMES.exists(), reason=f"the recorded step times are not here: {STEP_TIMES}")
def test_recorded_groups_are_searched_in_a_few_trials() -> None:
    ours = table(recorded(LARGE_GROUP), ["ours"]).loc["ours"]
    assert ours["to the optimum"] <= 2.8
    assert ours["to within 5%"] <= 2
    assert ours["regret after 5"] <= 0.015
