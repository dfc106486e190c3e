"""Layouts that train differently from the baseline are found, and rounding or other first weights are excused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trials import completed_row, failed_row
from tuner.analysis.losses import LOSS_TOLERANCE, trains_differently
from tuner.analysis.verdict import verdict
from tuner.core.layout import Layout
from tuner.core.workload import Precision
from tuner.trial.finished import FinishedTrial

START, FAST, FASTER = Layout(tp=8), Layout(tp=2), Layout(tp=4)
SEARCH = [
    completed_row(0, 100.0, layout=START, source="baseline"),
    completed_row(1, 90.0, layout=FAST),
    completed_row(2, 80.0, layout=FASTER),
]


def losing(row: FinishedTrial, *losses: float) -> FinishedTrial:
    assert row.result.metrics is not None
    return replace(row, result=replace(row.result, metrics=replace(row.result.metrics, losses=losses)))


@given(st.floats(0, 0.05), st.sampled_from(list(LOSS_TOLERANCE)))
def test_losses_may_differ_by_what_the_precision_explains(apart: float, precision: Precision) -> None:
    rows = [losing(SEARCH[0], 5.0, 4.0), losing(SEARCH[1], 5.0, 4.0 * (1 + apart), 3.0)]
    reasons = trains_differently([replace(row, precision=precision) for row in rows])
    assert (FAST in reasons) == (apart > LOSS_TOLERANCE[precision] * (1 + 1e-9)) or apart == pytest.approx(
        LOSS_TOLERANCE[precision]
    )


def test_a_program_that_draws_its_own_weights_may_differ_by_what_another_draw_explains() -> None:
    rows = [SEARCH[0], losing(SEARCH[1], 5.5, 5.3)]
    assert FAST in trains_differently(rows)
    assert trains_differently([replace(row, draws_weights=True) for row in rows]) == {}
    lost = [replace(row, draws_weights=True) for row in (SEARCH[0], losing(SEARCH[1], 5.5, 4.0))]
    assert "and other initial weights explain" in trains_differently(lost)[FAST]


def test_a_baseline_whose_own_runs_differ_excuses_as_much() -> None:
    again = losing(completed_row(3, 100.0, layout=START, source="canary"), 5.5, 5.0)
    other = losing(SEARCH[1], 5.5, 5.1)
    assert FAST in trains_differently([SEARCH[0], other])
    assert trains_differently([SEARCH[0], other, again]) == {}


def test_losses_are_not_compared_if_tokens_are_routed_at_random() -> None:
    rows = [SEARCH[0], losing(SEARCH[1], 5.5, 4.0)]
    assert FAST in trains_differently(rows)
    random = [replace(row, routes_at_random=True) for row in rows]
    assert trains_differently(random) == {}
    assert any("Losses were not compared" in line for line in verdict(random))


def test_without_a_measured_baseline_no_layout_is_out() -> None:
    rows = [replace(failed_row(0, source="baseline"), layout=START), SEARCH[1], losing(SEARCH[2], 1.0)]
    assert trains_differently(rows) == {}
