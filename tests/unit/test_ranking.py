"""The ranking of rows: best predicted first, then what the measurements make of it."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.policies import Predicted
from tests.bench.recorded import LARGE_GROUP, STEP_TIMES, groups
from tests.bench.replay import table
from tuner.layout import DEFAULTS, KNOBS
from tuner.search.ranking import Ranking, encode

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


def test_rows_like_one_that_disappointed_are_put_off() -> None:
    # The predictor thinks that the first column is worth nothing; it costs a factor of two a step.
    predicted = 100 + GRID[:, 0] * 0.1 + GRID[:, 1]
    truth = predicted * 2.0 ** (3 - GRID[:, 0])
    rows = measured(Ranking(GRID, predicted), truth, 6)
    assert rows[0] == 0
    assert truth[rows].min() < 1.1 * truth.min()


def test_knobs_become_doublings_switches_and_one_column_a_text() -> None:
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
    ours = table(groups(rows=LARGE_GROUP), ["ours"], seeds=1).loc["ours"]
    assert ours["to the optimum"] <= 2.8
    assert ours["to within 5%"] <= 2
    assert ours["regret at 5"] <= 0.015


@pytest.mark.skipif(not STEP_TIMES.exists(), reason=f"the recorded step times are not here: {STEP_TIMES}")
def test_the_policy_of_the_replay_learns_from_its_trials() -> None:
    group = next(iter(groups(rows=LARGE_GROUP)))
    policy, available = Predicted(group, 0), np.ones(len(group.table), dtype=np.bool_)
    first = policy.choose(available)
    available[first] = False
    policy.tell(first, float(group.measured_ms[first]))
    assert policy.choose(available) != first
