"""The surrogate: what measurements, bounds and rows in flight say about the predictor's errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, truncnorm  # type: ignore[import-untyped]
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from tuner.search.censoring import bound_sites
from tuner.search.surrogate import BIAS, ERROR, ERROR_WEIGHT, OWN_PART, REACH, Surrogate

GRID = np.array([(tp, micro) for tp in range(5) for micro in range(5)], dtype=np.float64)
ALL = np.arange(len(GRID))


def taught(errors: dict[int, float]) -> Surrogate:
    surrogate = Surrogate(GRID)
    for row, error in errors.items():
        surrogate.observe(row, error, log_ms=error)
    return surrogate


def test_before_a_measurement_only_the_prior_is_known() -> None:
    at = Surrogate(GRID).at(ALL)
    assert np.all(at.mean == 0)
    assert at.freedom == ERROR_WEIGHT
    assert at.deviation == pytest.approx(ERROR * np.sqrt(BIAS**2 + 1 + OWN_PART**2))


@settings(max_examples=20)
@given(st.dictionaries(st.integers(0, 24), st.floats(-1, 1), min_size=1, max_size=12))
def test_mean_and_variance_are_those_of_a_gaussian_process_of_the_learnt_scale(
    errors: dict[int, float],
) -> None:
    at = taught(errors).at(ALL)
    kernel = ConstantKernel(BIAS**2) + Matern(REACH, nu=0.5)
    process = GaussianProcessRegressor(kernel, alpha=OWN_PART**2, optimizer=None)
    rows, values = list(errors), np.array(list(errors.values()))
    process.fit(GRID[rows], values)
    mean, deviation = process.predict(GRID, return_std=True)
    assert at.mean == pytest.approx(mean, abs=1e-6)
    prior = process.kernel_(GRID[rows]) + OWN_PART**2 * np.eye(len(rows))
    fit = float(values @ np.linalg.solve(prior, values))
    scale = (ERROR_WEIGHT * ERROR**2 + fit) / (ERROR_WEIGHT + len(rows))
    assert at.deviation**2 == pytest.approx(scale * (deviation**2 + OWN_PART**2), rel=1e-4)


def test_of_many_measurements_the_fastest_and_the_latest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.search.surrogate.MOST_MEASURED", 4)
    surrogate, kept = Surrogate(GRID), Surrogate(GRID)
    log_ms = [3.0, 1.0, 5.0, 2.0, 4.0, 6.0, 7.0]
    for row, log_time_ms in enumerate(log_ms):
        surrogate.observe(row, 0.1 * row, log_time_ms)
        if row in (1, 3, 5, 6):
            kept.observe(row, 0.1 * row, log_time_ms)
    assert np.array_equal(surrogate.at(ALL).mean, kept.at(ALL).mean)
    assert np.array_equal(surrogate.at(ALL).deviation, kept.at(ALL).deviation)
    assert (surrogate.measured, surrogate.informed) == (7, 4)


def test_of_many_bounds_the_latest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.search.surrogate.MOST_BOUNDS", 2)
    surrogate, kept = taught({0: 0.1}), taught({0: 0.1})
    for row in (5, 6, 7, 8):
        surrogate.exceed(row, 0.2 * row)
        if row > 6:
            kept.exceed(row, 0.2 * row)
    assert np.array_equal(surrogate.at(ALL).mean, kept.at(ALL).mean)
    assert surrogate.informed == 3


def test_a_predictor_that_is_often_wrong_is_trusted_less() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, 10)
    small, large = (taught(dict(enumerate(scale * noise))).at(ALL).deviation for scale in (0.05, 0.5))
    assert np.all(large > 4 * small)


def test_an_error_that_all_layouts_share_is_no_sign_of_a_bad_predictor() -> None:
    near = taught({0: 0.01, 7: -0.02, 20: 0.0})
    far = taught({0: 1.01, 7: 0.98, 20: 1.0})
    assert far.at(ALL).deviation == pytest.approx(near.at(ALL).deviation, rel=0.1)
    assert far.at(ALL).mean == pytest.approx(near.at(ALL).mean + 1, abs=0.05)


def test_a_row_in_flight_changes_no_expected_value_and_narrows_its_neighbours() -> None:
    surrogate = taught({0: 0.2, 24: -0.3})
    before, after = surrogate.at(ALL), surrogate.at(ALL, [12])
    assert after.mean == pytest.approx(before.mean, abs=1e-9)
    assert after.deviation[13] < before.deviation[13]
    assert np.all(after.deviation <= before.deviation + 1e-12)
    assert after.freedom == before.freedom
    assert surrogate.at(ALL).deviation == pytest.approx(before.deviation, abs=0)


def test_a_bound_below_the_expected_value_changes_next_to_nothing() -> None:
    errors = {0: 0.1, 6: 0.0, 18: -0.1, 24: 0.05}
    plain, bounded = taught(errors), taught(errors)
    bounded.exceed(12, -3.0)
    assert bounded.at(ALL).mean == pytest.approx(plain.at(ALL).mean, abs=1e-3)
    assert bounded.at(ALL).deviation == pytest.approx(plain.at(ALL).deviation, rel=1e-3)


def test_a_bound_above_the_expected_value_raises_its_row_and_the_neighbours_without_settling_them() -> None:
    errors = {0: 0.1, 6: 0.0, 18: -0.1, 24: 0.05}
    plain, bounded, exact = taught(errors), taught(errors), taught({**errors, 12: 0.6})
    bounded.exceed(12, 0.6)
    raised = bounded.at(ALL).mean - plain.at(ALL).mean
    assert bounded.at(ALL).mean[12] > 0.4
    assert raised[12] > raised[13] > 0
    assert raised[13] > raised[4]
    assert bounded.at(ALL).deviation[12] > 0
    # A bound says nothing about values above it, so it adds no degree of freedom, unlike a measurement.
    assert bounded.at(ALL).freedom < exact.at(ALL).freedom


def test_a_bound_alone_raises_its_row() -> None:
    surrogate = Surrogate(GRID)
    surrogate.exceed(12, 1.0)
    at = surrogate.at(ALL)
    assert at.mean[12] > 1.0
    assert at.mean[12] > at.mean[0] > 0


@given(st.floats(-3, 3), st.floats(0.1, 3), st.floats(-4, 8))
def test_one_site_gives_the_moments_of_the_truncated_normal(mean: float, deviation: float, z: float) -> None:
    bound = mean + z * deviation
    (value,), (variance,) = bound_sites(np.array([mean]), np.array([[deviation**2]]), np.array([bound]))
    posterior = 1 / (1 / deviation**2 + 1 / variance)
    expected = truncnorm(z, np.inf, loc=mean, scale=deviation)
    # A bound far below the mean says so little that only absolute errors count.
    assert posterior * (mean / deviation**2 + value / variance) == pytest.approx(
        expected.mean(), abs=1e-3 * deviation
    )
    assert posterior == pytest.approx(expected.var(), abs=2e-3 * deviation**2)


def test_draws_have_the_posteriors_mean_spread_and_correlation() -> None:
    surrogate = taught({0: 0.1, 6: 0.0, 18: -0.1, 24: 0.05, 3: 0.2})
    rows = np.array([1, 2, 22])
    drawn = surrogate.draw(rows, 20_000, np.random.default_rng(0))
    at = surrogate.at(rows)
    for column in range(3):
        standard = (drawn[:, column] - at.mean[column]) / at.deviation[column]
        assert kstest(standard, "t", args=(at.freedom,)).pvalue > 0.001
    apart = np.asarray(np.corrcoef(drawn.T))
    assert apart[0, 1] > apart[0, 2] + 0.05


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_the_intervals_hold_as_often_as_they_claim_where_the_model_is_true(seed: int) -> None:
    random = np.random.default_rng(seed)
    away = np.linalg.norm(GRID[:, None] - GRID[None], axis=2)
    root = np.linalg.cholesky(np.exp(-away / REACH) + OWN_PART**2 * np.eye(len(GRID)))
    inside = 0
    for _ in range(20):
        scale = ERROR * np.sqrt(ERROR_WEIGHT / random.chisquare(ERROR_WEIGHT))
        errors = random.normal(0, 1) + scale * (root @ random.normal(0, 1, len(GRID)))
        order = random.permutation(len(GRID))
        at = taught({int(row): float(errors[row]) for row in order[:5]}).at(order[5:])
        # With 7 degrees of freedom, 90% of the values are within 1.895 deviations.
        inside += int((np.abs(errors[order[5:]] - at.mean) < 1.895 * at.deviation).sum())
    assert 0.75 < inside / (20 * 20) < 0.99
