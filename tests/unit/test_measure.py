"""When a trial has timed enough steps, and how sure its median is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.programs.megatron_core.measure import measured_enough, median_interval
from tuner.trial import Measurement

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


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        _, low, high = median_interval(generator.normal(100.0, 5.0, size=20).tolist())
        covered += low <= 100.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_more_steps_make_the_median_surer() -> None:
    generator = np.random.default_rng(7)
    few, many = generator.normal(100.0, 5.0, size=10), generator.normal(100.0, 5.0, size=200)
    widths = [high - low for _, low, high in (median_interval(few.tolist()), median_interval(many.tolist()))]
    assert widths[1] < widths[0] / 2


def test_no_step_has_no_median() -> None:
    with pytest.raises(ValueError, match="no step was timed"):
        median_interval([])


@given(st.lists(st.floats(1.0, 1e6), max_size=MEASUREMENT.min_steps - 1))
def test_fewer_than_the_least_steps_are_never_enough(times_ms: list[float]) -> None:
    assert not measured_enough(times_ms, MEASUREMENT)


@given(st.lists(st.floats(1.0, 1e6), min_size=MEASUREMENT.max_steps, max_size=30))
def test_the_most_steps_are_always_enough(times_ms: list[float]) -> None:
    assert measured_enough(times_ms, MEASUREMENT)


@given(st.floats(1.0, 1e6), st.integers(MEASUREMENT.min_steps, MEASUREMENT.max_steps))
def test_equal_steps_are_enough_at_once(time_ms: float, steps: int) -> None:
    assert measured_enough([time_ms] * steps, MEASUREMENT)


def test_noisy_steps_go_on_until_the_interval_is_narrow() -> None:
    assert not measured_enough([100.0, 110.0, 90.0, 105.0, 95.0, 100.0], MEASUREMENT)
    assert measured_enough([100.0, 100.5, 99.5, 100.2, 99.8, 100.0], MEASUREMENT)
