"""What is claimed about the best layout: how near it is, with which probability, and in which words."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.recorded import LARGE_GROUP, STEP_TIMES, groups
from tests.bench.stopping import calibration, claims_of, stops
from tuner.search.stopping import MIN_MEASURED, Certainty, certainty

CLAIM = Certainty(np.array([0.0, 0.0, 0.01, 0.02, 0.5]), MIN_MEASURED)


def test_the_share_of_draws_within_a_gain_is_its_probability() -> None:
    assert [CLAIM.within(gain) for gain in (0.0, 0.01, 0.015, 0.02, 1.0)] == [0.4, 0.6, 0.6, 0.8, 1.0]


def test_the_gain_of_a_confidence_is_the_smallest_that_reaches_it() -> None:
    assert [CLAIM.gain(confidence) for confidence in (0.3, 0.4, 0.5, 0.8, 0.95)] == [0, 0, 0.01, 0.02, 0.5]


@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=50),
    st.floats(0.01, 0.99),
)
def test_the_gain_of_a_confidence_has_at_least_that_probability(
    losses: list[float], confidence: float
) -> None:
    claim = Certainty(np.sort(losses), 1)
    assert claim.within(claim.gain(confidence)) >= confidence - 1e-9


def test_a_claim_suffices_only_with_enough_measurements_and_probability() -> None:
    assert CLAIM.suffices(0.02, 0.8)
    assert not CLAIM.suffices(0.02, 0.81)
    assert not replace(CLAIM, measured=MIN_MEASURED - 1).suffices(0.02, 0.8)


def test_a_gain_of_nothing_is_stated_in_words() -> None:
    assert CLAIM.sentence(0.4).startswith("The best is the best of the space with probability 40%,")


def test_the_sentence_states_the_gain_and_its_probability() -> None:
    assert CLAIM.sentence(0.8) == (
        "The best is within 2.0% of the best of the space with probability 80%, as far as the surrogate knows."
    )


def test_a_loss_is_how_much_slower_the_best_measured_is_than_the_best_of_all() -> None:
    left = np.log(np.array([[90.0, 95.0], [120.0, 130.0], [50.0, 200.0]]))
    claim = certainty(float(np.log(100.0)), left, np.ones(2), measured=5, random=np.random.default_rng(0))
    assert claim.losses == pytest.approx([0, 100 / 90 - 1, 1.0])


def test_rows_that_do_not_fit_cost_nothing() -> None:
    left = np.log(np.full((20_000, 1), 50.0))
    claim = certainty(
        float(np.log(100.0)), left, np.array([0.3]), measured=5, random=np.random.default_rng(0)
    )
    assert claim.within(0.0) == pytest.approx(0.7, abs=0.02)
    assert claim.within(1.001) == 1.0


def test_if_no_row_is_left_the_best_is_certain() -> None:
    claim = certainty(1.0, np.zeros((10, 0)), np.zeros(0), measured=5, random=np.random.default_rng(0))
    assert claim.within(0.0) == 1.0


@pytest.mark.skipif(not STEP_TIMES.exists(), reason=f"the recorded step times are not here: {STEP_TIMES}")
@pytest.mark.parametrize("spoilt_seeds", [0, 1])
def test_on_recorded_groups_the_claims_hold_and_a_sweep_stops_in_time(spoilt_seeds: int) -> None:
    claims = claims_of(groups(rows=LARGE_GROUP), spoilt_seeds)
    held = calibration(claims)
    sure = held[held["probability"].isin(["0.95 to 0.99", "0.99 to 1.00"])]
    assert len(sure) > 4
    assert np.average(sure["held"], weights=sure["claims"]) >= 0.97
    table = stops(claims)
    stopped = table[(table["gain"] == 0.01) & (table["confidence"] == 0.95)].iloc[0]
    assert stopped["held"] >= 0.92
    assert stopped["mean regret"] <= 0.01
    assert stopped["trials"] <= stopped["rows"] / 3
