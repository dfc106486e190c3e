"""A trial times enough steps, tells warm-up and outliers from the rest, and states how certain its median is."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from launchers.programs.harness.measure import (
    lower_bound_ms,
    measured_enough,
    median_interval,
    outliers,
    warmup_end,
)
from tuner.trial.contract import Measurement

Noise = Callable[[np.random.Generator, int], NDArray[np.float64]]
NOISES: dict[str, Noise] = {
    "normal": lambda random, steps: random.normal(size=steps),
    "heavy-tailed": lambda random, steps: random.laplace(scale=0.5**0.5, size=steps),
    "skewed": lambda random, steps: (np.exp(0.5 * random.normal(size=steps)) - 1) / 0.6,
}
"""Draws of noise by name, with median 0 and standard deviation 1, or nearly so."""

TIMES = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=40)
MEASUREMENT = Measurement(warmup_steps=3, min_steps=5, max_steps=20, target_relative_interval=0.02)


@given(TIMES)
def test_the_interval_holds_the_median_and_lies_within_the_times(times_ms: list[float]) -> None:
    median, low, high = median_interval(times_ms)
    assert median == np.median(times_ms)
    assert min(times_ms) <= low <= median <= high <= max(times_ms)


@given(TIMES)
def test_every_rank_gets_the_same_interval(times_ms: list[float]) -> None:
    assert median_interval(times_ms) == median_interval(list(times_ms))


def test_the_interval_covers_the_true_median_about_as_often_as_it_claims() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        _, low, high = median_interval(generator.normal(100.0, 5.0, size=20).tolist())
        covered += low <= 100.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_more_steps_make_the_interval_narrower() -> None:
    generator = np.random.default_rng(7)
    few, many = generator.normal(100.0, 5.0, size=10), generator.normal(100.0, 5.0, size=200)
    widths = [high - low for _, low, high in (median_interval(few.tolist()), median_interval(many.tolist()))]
    assert widths[1] < widths[0] / 2


def test_there_is_no_median_without_a_step() -> None:
    with pytest.raises(ValueError, match="no step was timed"):
        median_interval([])


@given(st.lists(st.floats(1.0, 1e6), max_size=MEASUREMENT.min_steps - 1))
def test_fewer_steps_than_the_minimum_are_never_enough(times_ms: list[float]) -> None:
    assert not measured_enough(times_ms, MEASUREMENT)


@given(st.lists(st.floats(1.0, 1e6), min_size=MEASUREMENT.max_steps, max_size=30))
def test_the_maximum_of_steps_is_always_enough(times_ms: list[float]) -> None:
    assert measured_enough(times_ms, MEASUREMENT)


@given(st.floats(1.0, 1e6), st.integers(MEASUREMENT.min_steps, MEASUREMENT.max_steps))
def test_equal_steps_are_enough_at_once(time_ms: float, steps: int) -> None:
    assert measured_enough([time_ms] * steps, MEASUREMENT)


def test_noisy_steps_go_on_until_the_interval_is_narrow() -> None:
    assert not measured_enough([100.0, 110.0, 90.0, 105.0, 95.0, 100.0], MEASUREMENT)
    assert measured_enough([100.0, 100.5, 99.5, 100.2, 99.8, 100.0], MEASUREMENT)


@given(TIMES)
def test_the_minimum_of_steps_is_timed_however_many_are_warm_up(times_ms: list[float]) -> None:
    always = Measurement(min_steps=4, max_steps=4)
    if measured_enough(times_ms, always):
        assert len(times_ms) - warmup_end(times_ms, 0.02) >= 4
    else:
        assert len(times_ms) < 8, (
            "at most half of the steps are warm-up, so eight always hold four timed ones"
        )


@given(TIMES, st.floats(0.001, 0.5))
def test_at_most_half_of_the_steps_are_warm_up(times_ms: list[float], tolerance: float) -> None:
    assert 0 <= warmup_end(times_ms, tolerance) <= len(times_ms) / 2


@given(TIMES, st.floats(1e-3, 1e3))
def test_the_unit_of_the_times_does_not_matter(times_ms: list[float], factor: float) -> None:
    power_of_two = 2.0 ** round(np.log2(factor))  # exact, so that equal stays equal
    scaled = [time_ms * power_of_two for time_ms in times_ms]
    assert warmup_end(scaled, 0.02) == warmup_end(times_ms, 0.02)
    assert outliers(scaled, 0.02) == outliers(times_ms, 0.02)


@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("slow", [1, 2, 3, 4])
def test_slow_first_steps_are_warm_up_however_many_they_are(slow: int, steps: int) -> None:
    random = np.random.default_rng(3)
    counts = []
    for _ in range(200):
        times = 100 * (1 + 0.01 * random.normal(size=steps))
        times[:slow] *= np.linspace(1.4, 1.15, slow)
        counts.append(warmup_end(times.tolist(), 0.02))
    assert np.mean(np.array(counts) == slow) >= 0.95


@given(
    st.lists(st.floats(95.0, 105.0), min_size=7, max_size=20),
    st.integers(1, 19),
    st.floats(2.0, 100.0),
)
def test_one_slow_step_later_on_is_no_warm_up(times_ms: list[float], place: int, factor: float) -> None:
    # The two differences to its neighbours are among at least six, so their median stays equal or grows.
    place = 1 + (place - 1) % (len(times_ms) - 1)
    slow = [time_ms * factor if step == place else time_ms for step, time_ms in enumerate(times_ms)]
    assert warmup_end(slow, 0.11) == 0


@pytest.mark.parametrize("deviation", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("noise", NOISES)
def test_steady_noise_is_seldom_taken_for_warm_up(noise: str, deviation: float) -> None:
    random = np.random.default_rng(11)
    lost = []
    for steps in (5, 8, 12, 20):
        for _ in range(500):
            times = 100 * np.maximum(1 + deviation * NOISES[noise](random, steps), 0.1)
            lost.append(warmup_end(times.tolist(), 0.02))
    assert np.mean(np.array(lost) > 0) <= (0.03 if noise == "skewed" else 0.02)
    assert np.mean(lost) <= 0.03


def test_a_trial_that_warms_up_goes_on_and_measures_the_level_it_reaches() -> None:
    random = np.random.default_rng(5)
    medians, counts = [], []
    for _ in range(50):
        times_ms: list[float] = []
        while not measured_enough(times_ms, MEASUREMENT):
            level = 100 + 80 * 0.5 ** len(times_ms)
            times_ms.append(level * (1 + 0.005 * random.normal()))
        timed = times_ms[warmup_end(times_ms, MEASUREMENT.target_relative_interval) :]
        medians.append(np.median(timed))
        counts.append(len(times_ms))
    assert max(medians) < 103
    assert np.mean(medians) < 101
    assert max(counts) < MEASUREMENT.max_steps


@pytest.mark.parametrize(("deviation", "most"), [(0.002, 5.1), (0.01, 6.0), (0.03, 15.0), (0.1, 20.0)])
def test_noisier_steps_take_more_of_them_and_the_interval_covers_the_median_as_it_claims(
    deviation: float, most: float
) -> None:
    random = np.random.default_rng(2)
    counts, covered, trials = [], 0, 100
    for _ in range(trials):
        times_ms: list[float] = []
        while not measured_enough(times_ms, MEASUREMENT):
            times_ms.append(100 * (1 + deviation * random.normal()))
        _, low, high = median_interval(times_ms[warmup_end(times_ms, 0.02) :])
        covered += low <= 100 <= high
        counts.append(len(times_ms))
    assert np.mean(counts) <= most
    assert covered / trials >= 0.87, "an interval that is read after every step covers less than its 95%"


def test_a_step_far_from_the_median_is_an_outlier_and_one_within_the_tolerance_is_not() -> None:
    times_ms = [100.0, 100.1, 180.0, 99.9, 100.0, 60.0, 101.0]
    assert outliers(times_ms, 0.02) == (2, 5)
    assert outliers(times_ms, 0.005) == (2, 5, 6)
    assert outliers([100.0, 900.0], 0.02) == ()


@pytest.mark.parametrize("noise", ["normal", "skewed"])
def test_steady_noise_has_few_outliers(noise: str) -> None:
    random = np.random.default_rng(4)
    places = [outliers((100 * (1 + 0.03 * NOISES[noise](random, 20))).tolist(), 0.02) for _ in range(300)]
    assert np.mean([len(of_trial) for of_trial in places]) / 20 <= 0.03


@given(TIMES)
def test_the_bound_lies_below_the_interval(times_ms: list[float]) -> None:
    bound_ms = lower_bound_ms(times_ms, MEASUREMENT)
    if len(times_ms) < 3:
        assert bound_ms is None
    if bound_ms is not None:
        assert 0 < bound_ms <= median_interval(times_ms[warmup_end(times_ms, 0.02) :])[1]


def test_there_is_no_bound_while_the_last_step_is_the_fastest() -> None:
    assert lower_bound_ms([900.0, 899.0, 898.0, 897.0], MEASUREMENT) is None
    bound_ms = lower_bound_ms([900.0, 899.0, 898.0, 897.0, 899.0], MEASUREMENT)
    assert bound_ms == pytest.approx(896, abs=2)


@pytest.mark.parametrize("noise", ["normal", "skewed"])
@pytest.mark.parametrize(
    ("slower", "deviation", "least", "most"),
    [
        (0.98, 0.01, 0.0, 0.005),
        (0.98, 0.05, 0.0, 0.06),
        (1.0, 0.05, 0.0, 0.15),
        (1.1, 0.01, 0.9, 1.0),
        (1.3, 0.05, 0.95, 1.0),
    ],
)
def test_a_trial_is_given_up_if_it_is_slower_and_hardly_ever_if_it_is_faster(
    slower: float, deviation: float, least: float, most: float, noise: str
) -> None:
    random = np.random.default_rng(9)
    given_up, counts, trials = 0, [], 40
    for _ in range(trials):
        steps = NOISES[noise](random, MEASUREMENT.max_steps)
        times = (100 * slower * (1 + deviation * steps)).tolist()
        done = 0
        while not measured_enough(times[:done], MEASUREMENT):
            bound_ms = lower_bound_ms(times[:done], MEASUREMENT)
            if bound_ms is not None and bound_ms > 100:
                given_up += 1
                counts.append(done)
                break
            done += 1
    assert least <= given_up / trials <= most
    if slower > 1:
        assert np.mean(counts) < 5


def test_a_trial_that_warms_up_to_something_fast_is_not_given_up() -> None:
    random = np.random.default_rng(6)
    given_up = 0
    for _ in range(50):
        levels = 90 * (1 + 0.5 * 0.7 ** np.arange(MEASUREMENT.max_steps))
        times = (levels * (1 + 0.01 * random.normal(size=len(levels)))).tolist()
        bounds = [lower_bound_ms(times[:done], MEASUREMENT) for done in range(len(times))]
        given_up += any(bound_ms is not None and bound_ms > 100 for bound_ms in bounds)
    assert given_up / 50 <= 0.03
