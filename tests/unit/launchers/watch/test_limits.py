"""The limits of a running trial: when each is passed, and what the steps seen say of the step time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.watch.limits import LEAST_SILENCE_S, SILENT_STEPS, Ending, LimitWatch
from tuner.trial.contract import Heartbeat, Limits

LIMITS = Limits(startup_s=10.0, step_s=5.0, trial_s=100.0)
LONG = Limits(startup_s=600.0, step_s=300.0, trial_s=100_000.0)


def watch_of(step: int | None, seen_s: float) -> LimitWatch:
    watch = LimitWatch(LIMITS, started_s=1000.0)
    if step is not None:
        watch.beat(Heartbeat(phase="measure", step=step, time_s=0.0), seen_s)
    return watch


@pytest.mark.parametrize(
    ("step", "seen_s", "now_s", "passed"),
    [
        (None, 0.0, 1010.0, None),
        (None, 0.0, 1010.1, "startup"),
        (0, 1009.0, 1010.1, "startup"),  # a heartbeat before the first step ended does not stretch the start
        (1, 1009.0, 1014.0, None),
        (1, 1009.0, 1014.1, "step"),
        (7, 1099.0, 1100.1, "trial"),
    ],
)
def test_a_limit_is_passed_only_after_its_time(
    step: int | None, seen_s: float, now_s: float, passed: Ending | None
) -> None:
    assert watch_of(step, seen_s).passed(now_s) == passed


def test_a_heartbeat_seen_again_is_no_sign_of_life() -> None:
    watch = watch_of(1, 1009.0)
    assert not watch.beat(Heartbeat(phase="measure", step=1, time_s=0.0), 1013.0)
    assert watch.passed(1014.1) == "step"
    assert watch.beat(Heartbeat(phase="measure", step=2, time_s=0.0), 1014.1)
    assert watch.passed(1014.2) is None


def test_the_steps_seen_bound_the_step_time_from_below() -> None:
    watch = LimitWatch(LIMITS, started_s=1000.0)
    assert watch.slower_than_ms(1004.0) is None, "nothing is known before the first step"
    for step, now_s in ((0, 1001.0), (1, 1003.0), (2, 1005.0), (3, 1007.0)):
        watch.beat(Heartbeat(phase="warmup", step=step, time_s=now_s), now_s)
    # Two steps took four seconds, and the third is not done after three more.
    assert watch.slower_than_ms(1010.0) == pytest.approx(7000 / 3)


def stepping(step_s: float, steps: int, limits: Limits = LONG) -> tuple[LimitWatch, float]:
    """Return a watch that saw the first step and `steps` more of `step_s` each, and the time of the last."""
    watch, now_s = LimitWatch(limits, started_s=0.0), 100.0
    for step in range(1, steps + 2):
        watch.beat(Heartbeat(phase="measure", step=step, time_s=0.0), now_s)
        now_s += step_s
    return watch, now_s - step_s


@pytest.mark.parametrize(
    ("step_s", "steps", "silence_s"),
    [
        (2.0, 2, LONG.step_s),  # too few steps to know: the next may compile an expert for the first time
        (2.0, 3, SILENT_STEPS * 2.0),
        (0.1, 50, LEAST_SILENCE_S),
        (60.0, 3, LONG.step_s),
    ],
)
def test_the_silence_that_counts_as_a_hang_follows_from_the_steps_once_they_are_known(
    step_s: float, steps: int, silence_s: float
) -> None:
    watch, now_s = stepping(step_s, steps)
    assert watch.silence_s == pytest.approx(silence_s)
    assert watch.passed(now_s + silence_s - 0.01) is None
    assert watch.passed(now_s + silence_s + 0.01) == "step"


def test_the_slowest_step_counts_with_the_phases_that_begin_during_it() -> None:
    watch, now_s = stepping(2.0, 3)
    watch.beat(Heartbeat(phase="teardown", step=4, time_s=0.0), now_s + 4.0)
    assert watch.silence_s == pytest.approx(SILENT_STEPS * 2.0)
    watch.beat(Heartbeat(phase="measure", step=5, time_s=0.0), now_s + 5.0)
    assert watch.silence_s == pytest.approx(SILENT_STEPS * 5.0)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=30))
def test_a_silence_as_long_as_a_step_that_was_seen_is_no_hang(step_times_s: list[float]) -> None:
    watch, now_s = LimitWatch(Limits(step_s=1000.0, trial_s=1e9), started_s=0.0), 1.0
    watch.beat(Heartbeat(phase="warmup", step=1, time_s=0.0), now_s)
    for step, step_s in enumerate(step_times_s, start=2):
        now_s += step_s
        watch.beat(Heartbeat(phase="measure", step=step, time_s=0.0), now_s)
    assert max(step_times_s) < watch.silence_s <= 1000.0 or watch.silence_s == 1000.0
    assert watch.passed(now_s + max(step_times_s)) is None
