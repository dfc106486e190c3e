"""Drift of the machine: it is found if there is one, its interval holds, and trials are corrected for it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trials import completed_row, failed_row
from tuner.analysis.drift import canary_due, drift
from tuner.core.layout import Layout
from tuner.trial.finished import FinishedTrial

START = Layout(tp=8)


def canaries(steps_ms: list[float], every: int = 10) -> list[FinishedTrial]:
    """The runs of the baseline, one per `every` minutes."""
    return [
        completed_row(place * every, ms, layout=START, source="canary" if place else "baseline")
        for place, ms in enumerate(steps_ms)
    ]


def test_the_drift_of_a_machine_that_slows_steadily_is_measured() -> None:
    machine_drift = drift(canaries([100.0, 102.1, 103.9, 106.0]))
    assert machine_drift is not None
    assert machine_drift.is_significant
    assert machine_drift.change == pytest.approx(0.06, abs=0.005)
    assert machine_drift.change_low < 0.06 < machine_drift.change_high
    assert "The machine drifted: +5.9% step time over 0.5 h" in machine_drift.sentence()


def test_a_steady_machine_shows_no_drift() -> None:
    machine_drift = drift(canaries([100.0, 101.0, 99.5, 100.4, 100.1]))
    assert machine_drift is not None
    assert not machine_drift.is_significant
    assert machine_drift.factor(completed_row(40, 50.0)) == 1.0
    assert machine_drift.sentence().startswith("No drift of the machine is shown")


def test_two_runs_show_no_drift_and_failed_or_disturbed_runs_do_not_count() -> None:
    rows = canaries([100.0, 110.0, 120.0])
    assert drift(rows[:2]) is None
    disturbed = replace(rows[2], result=replace(rows[2].result, suspicions=("shared",)))
    assert drift([*rows[:2], disturbed]) is None
    assert drift([*rows[:2], failed_row(30, source="canary")]) is None
    unknown = replace(rows[2], result=replace(rows[2].result, finished_at=""))
    assert drift([*rows[:2], unknown]) is None


def test_the_factor_grows_between_the_runs_and_stays_constant_beyond_them() -> None:
    machine_drift = drift(canaries([100.0, 102.0, 104.04, 106.1208]))
    assert machine_drift is not None
    factors = [machine_drift.factor(completed_row(minute, 50.0)) for minute in (0, 15, 30, 59)]
    assert factors == pytest.approx([1.0, 1.02**1.5, 1.02**3, 1.02**3], rel=1e-3)


def test_noise_alone_is_called_a_drift_once_in_twenty() -> None:
    random = np.random.default_rng(5)
    called = 0
    for _ in range(400):
        machine_drift = drift(canaries((100 * np.exp(random.normal(0, 0.01, 5))).tolist()))
        called += machine_drift is not None and machine_drift.is_significant
    assert 8 <= called <= 36


@given(st.floats(-0.2, 0.2), st.integers(3, 6))
def test_a_drift_without_noise_is_measured_exactly(change: float, runs: int) -> None:
    machine_drift = drift(
        canaries([100 * (1 + change) ** (place / (runs - 1)) for place in range(runs)], every=9)
    )
    assert machine_drift is not None
    assert machine_drift.change == pytest.approx(change, abs=1e-9)


def test_a_canary_is_due_after_so_many_trials_of_the_search() -> None:
    rows = [completed_row(0, 100.0, layout=START, source="baseline")]
    rows += [completed_row(number, 90.0) for number in (1, 2)]
    assert canary_due(rows, 3) is None
    rows.append(failed_row(3))
    assert canary_due(rows, 3) == START
    assert canary_due(rows, None) is None
    assert canary_due([*rows, failed_row(4, source="canary")], 3) is None


def test_a_baseline_that_never_completed_is_no_canary() -> None:
    rows = [failed_row(0, source="baseline"), *(completed_row(number, 90.0) for number in range(1, 9))]
    assert canary_due(rows, 3) is None
