"""Which layouts run in the finals, in which order, and which trials are repeated before them."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trials import completed_row, failed_row
from tuner.analysis.finals import (
    FinalsPlan,
    eligible_finalists,
    expected_trial_s,
    fitting_plan,
    next_final,
    trials_to_repeat,
)
from tuner.core.layout import Layout
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial

START = Layout(tp=8)
LAYOUTS = [Layout(micro_batch_size=2**power) for power in range(5)]
SEARCH = [
    completed_row(0, 100.0, layout=START, source="baseline"),
    *(completed_row(number, 90.0 - number, layout=layout) for number, layout in enumerate(LAYOUTS, 1)),
]
A, B, C = LAYOUTS[4], LAYOUTS[3], LAYOUTS[2]
"""The three fastest layouts, in order."""


def played(rows: list[FinishedTrial], plan: FinalsPlan, limit: int = 99) -> list[Layout]:
    """The finals in the order in which they run, if each of them measures what the search measured."""
    steps = {row.layout: row.result.metrics.step_time_ms for row in rows if row.result.metrics}
    ran: list[Layout] = []
    rows = list(rows)
    while len(ran) < limit and (layout := next_final(rows, plan)) is not None:
        rows.append(completed_row(len(rows), steps[layout], layout=layout, source="final"))
        ran.append(layout)
    return ran


def test_the_fastest_and_the_baseline_run_in_rounds_every_other_one_reversed() -> None:
    assert played(SEARCH, FinalsPlan(3, 3)) == [A, B, C, START, START, C, B, A, A, B, C, START]


def test_a_baseline_among_the_fastest_runs_as_often_as_any() -> None:
    fast = [replace(SEARCH[0], result=completed_row(0, 10.0).result), *SEARCH[1:]]
    assert played(fast, FinalsPlan(2, 2)) == [A, B, START, START, B, A]


def test_without_a_measured_baseline_the_finalists_run_alone() -> None:
    rows = [failed_row(0, source="baseline"), *SEARCH[1:]]
    assert played(rows, FinalsPlan(2, 2)) == [A, B, B, A]


@pytest.mark.parametrize("rows", [[], SEARCH[:1], [failed_row(0, source="baseline"), SEARCH[1]]])
def test_with_nothing_to_compare_there_are_no_finals(rows: list[FinishedTrial]) -> None:
    assert next_final(rows, FinalsPlan(3, 3)) is None


def test_if_no_finals_are_planned_none_run() -> None:
    assert next_final(SEARCH, FinalsPlan(0, 0)) is None


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 30))
def test_finals_that_were_interrupted_continue_where_they_stopped(
    finalists: int, runs: int, cut: int
) -> None:
    plan = FinalsPlan(finalists, runs)
    whole, begun = played(SEARCH, plan), played(SEARCH, plan, cut)
    steps = {row.layout: row.result.metrics.step_time_ms for row in SEARCH if row.result.metrics}
    rows = [
        *SEARCH,
        *(
            completed_row(6 + place, steps[layout], layout=layout, source="final")
            for place, layout in enumerate(begun)
        ),
    ]
    assert begun + played(rows, plan) == whole
    assert len(whole) == plan.trials


def test_a_finalist_that_fails_is_replaced_by_the_next_and_the_rounds_are_caught_up() -> None:
    rows = [
        *SEARCH,
        completed_row(6, 85.0, layout=A, source="final"),
        replace(failed_row(7, Outcome.NAN, source="final"), layout=B),
    ]
    assert played(rows, FinalsPlan(2, 2)) == [C, START, START, C, A]


def test_whatever_is_searched_after_the_finals_makes_them_run_again() -> None:
    rows = list(SEARCH)
    for layout in played(SEARCH, FinalsPlan(2, 2)):
        rows.append(completed_row(len(rows), 85.0, layout=layout, source="final"))
    assert next_final(rows, FinalsPlan(2, 2)) is None
    rows.append(completed_row(len(rows), 50.0, layout=Layout(pp=2)))
    assert played(rows, FinalsPlan(2, 2))[:2] == [Layout(pp=2), A]


def test_a_layout_that_trains_differently_does_not_run_in_the_finals() -> None:
    metrics = SEARCH[5].result.metrics
    assert metrics is not None
    other = replace(SEARCH[5], result=replace(SEARCH[5].result, metrics=replace(metrics, losses=(9.0,))))
    assert eligible_finalists([*SEARCH[:5], other])[:2] == [B, C]


def test_finals_lose_finalists_first_then_runs_and_then_vanish() -> None:
    wanted = FinalsPlan(3, 3)
    sizes = [fitting_plan(wanted, 9, trials, 1e9, 60.0) for trials in (12, 11, 9, 8, 6, 5, 4, 3, 0)]
    assert sizes == [
        FinalsPlan(3, 3),
        FinalsPlan(2, 3),
        FinalsPlan(2, 3),
        FinalsPlan(1, 3),
        FinalsPlan(1, 3),
        FinalsPlan(1, 2),
        FinalsPlan(1, 2),
        FinalsPlan(0, 0),
        FinalsPlan(0, 0),
    ]


@given(
    st.integers(0, 5),
    st.integers(2, 4),
    st.integers(0, 9),
    st.integers(0, 40),
    st.floats(0, 2e3),
    st.floats(0, 99),
)
def test_finals_never_take_more_trials_or_time_than_are_left(
    finalists: int, runs: int, eligible: int, trials: int, seconds: float, trial_s: float
) -> None:
    plan = fitting_plan(FinalsPlan(finalists, runs), eligible, trials, seconds, trial_s)
    assert plan.trials <= trials
    assert plan.trials * trial_s <= seconds or plan.trials == 0
    assert plan.finalists <= min(finalists, eligible)


def disturbed(row: FinishedTrial) -> FinishedTrial:
    return replace(row, result=replace(row.result, suspicions=("shared",)))


def test_disturbed_trials_of_the_search_are_repeated_once_fastest_first() -> None:
    slow = failed_row(7, Outcome.TOO_SLOW)
    slow = disturbed(replace(slow, result=replace(slow.result, slower_than_ms=87.5)))
    rows = [SEARCH[0], *map(disturbed, SEARCH[1:3]), *SEARCH[3:], slow, disturbed(failed_row(8))]
    canary = disturbed(completed_row(9, 100.0, layout=START, source="canary"))
    assert [row.number for row in trials_to_repeat([*rows, canary])] == [7, 2, 1]
    again = completed_row(10, 95.0, layout=LAYOUTS[1], source="repeat")
    assert [row.number for row in trials_to_repeat([*rows, canary, disturbed(again)])] == [7, 1]


def test_a_trial_is_expected_to_take_what_its_layout_took() -> None:
    def taking(row: FinishedTrial, seconds: float) -> FinishedTrial:
        durations = replace(row.result.durations, total_s=seconds)
        return replace(row, result=replace(row.result, durations=durations))

    rows = [taking(SEARCH[0], 50.0), taking(SEARCH[1], 10.0), taking(SEARCH[2], 20.0), failed_row(9)]
    assert expected_trial_s(rows) == 20.0
    assert expected_trial_s(rows, [START, LAYOUTS[0]]) == 50.0
    assert expected_trial_s(rows, [Layout(pp=2)]) == 20.0
    assert expected_trial_s([]) == 0.0
