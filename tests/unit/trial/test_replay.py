"""A trial is compared with its rerun."""

from dataclasses import replace

import pytest

from tests.trials import completed_row, failed_row
from tuner.trial.contract import Outcome, TrialResult
from tuner.trial.replay import compare

BEFORE = completed_row(0, 100.0).result


def again(step_time_ms: float) -> TrialResult:
    return completed_row(0, step_time_ms).result


@pytest.mark.parametrize(
    ("step_time_ms", "same"), [(100.0, True), (101.9, True), (102.1, False), (50.0, False)]
)
def test_a_trial_is_reproduced_while_the_intervals_overlap(step_time_ms: float, same: bool) -> None:
    comparison = compare(BEFORE, again(step_time_ms))
    assert comparison.same_speed is same
    assert comparison.reproduced is same


def test_figures_are_compared_in_their_units() -> None:
    figures = {figure.name: figure for figure in compare(BEFORE, again(110.0)).figures}
    assert figures["step time, ms"].change == pytest.approx(0.1)
    assert figures["peak allocated, GiB"].change == 0


def test_losses_are_compared_over_the_steps_that_both_ran() -> None:
    assert compare(BEFORE, BEFORE).loss_difference == 0
    assert BEFORE.metrics is not None
    metrics = replace(BEFORE.metrics, losses=(5.5, 5.4 * 1.01))
    assert compare(BEFORE, replace(BEFORE, metrics=metrics)).loss_difference == pytest.approx(0.01)


def test_a_rerun_with_another_outcome_does_not_reproduce_and_compares_no_figures() -> None:
    comparison = compare(BEFORE, failed_row(0, Outcome.OOM).result)
    assert (comparison.same_outcome, comparison.same_speed, comparison.reproduced) == (False, None, False)
    assert comparison.figures == ()


def test_changed_versions_and_the_changed_device_are_named() -> None:
    versions = {**BEFORE.versions, "torch": "2.14.0", "nccl": "2.30"}
    after = replace(BEFORE, versions=versions, device_name="NVIDIA H200")
    assert compare(BEFORE, after).versions == {
        "torch": ("2.13.0", "2.14.0"),
        "nccl": ("none", "2.30"),
        "device": ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    }
