"""A sweep keeps its limits to within one trial, and keeps a share for its finals."""

from bisect import bisect_left
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trials import completed_row
from tuner.analysis.finals import FinalsPlan
from tuner.core.layout import Layout
from tuner.sweep.budget import Deadline, Ledger, Stop, shrunk
from tuner.sweep.configuration import Budget
from tuner.trial.finished import FinishedTrial

TRIAL_S = 15.0
"""Wall clock in seconds of a completed trial of tests.trials."""


@cache
def trials_of(count: int) -> tuple[FinishedTrial, ...]:
    return tuple(
        completed_row(
            number,
            100.0 - number,
            layout=Layout(micro_batch_size=number + 1),
            source="sampler" if number else "baseline",
        )
        for number in range(count)
    )


def ledger(finished: tuple[FinishedTrial, ...], deadline: Deadline | None = None, **budget: Any) -> Ledger:
    return Ledger(budget=Budget(**budget), world_size=8, trials=finished, lost_s=0.0, deadline=deadline)


def with_finals(trials: tuple[FinishedTrial, ...], count: int) -> tuple[FinishedTrial, ...]:
    layouts = [trials[-1].layout, trials[0].layout]
    ran = (
        completed_row(len(trials) + place, 90.0, layout=layouts[place % 2], source="final")
        for place in range(count)
    )
    return (*trials, *ran)


def search_trials(
    limit: int = 99, deadline: Deadline | None = None, **budget: Any
) -> tuple[int, Stop | None]:
    """Return how many trials the search gets, and why it ends; a search that is over stays over."""

    def reason(count: int) -> Stop | None:
        return ledger(trials_of(count), deadline, **budget).search_is_over()

    count = bisect_left(range(limit), True, key=lambda count: reason(count) is not None)
    return count, reason(count)


@pytest.mark.parametrize(
    ("budget", "count", "reason"),
    [
        ({"trials": 40}, 28, Stop.TRIALS),
        ({"trials": 8}, 4, Stop.TRIALS),
        ({"trials": 3}, 3, Stop.TRIALS),
        ({"trials": 40, "finalists": 0}, 40, Stop.TRIALS),
        # Twelve finals of 15 s take 180 s; the search gets the other 220 s.
        ({"trials": 100, "hours": 400 / 3600}, 15, Stop.HOURS),
        ({"trials": 100, "gpu_hours": 8 * 400 / 3600}, 15, Stop.GPU_HOURS),
        # Half of the 200 s is kept, which is enough for six finals of 15 s.
        ({"trials": 100, "hours": 200 / 3600}, 8, Stop.HOURS),
    ],
)
def test_the_search_leaves_room_for_the_finals(budget: dict[str, Any], count: int, reason: Stop) -> None:
    assert search_trials(**budget) == (count, reason)


def test_the_deadline_leaves_room_for_the_next_trial_and_the_finals() -> None:
    trials = trials_of(5)
    for left_s, reason in ((13 * TRIAL_S + 1, None), (13 * TRIAL_S - 1, Stop.DEADLINE)):
        deadline = Deadline(began_s=0.0, now_s=1000.0 - left_s, deadline_s=1000.0)
        assert ledger(trials, deadline, trials=100).search_is_over() is reason


def test_the_search_stays_over_while_finals_before_a_deadline_are_incomplete() -> None:
    deadline = Deadline(began_s=0.0, now_s=100.0, deadline_s=1e6)
    trials = trials_of(5)
    assert ledger(with_finals(trials, 3), deadline, trials=100).search_is_over() is Stop.DEADLINE
    assert ledger(with_finals(trials, 3), None, trials=100).search_is_over() is None


def test_a_trial_that_would_end_after_the_deadline_does_not_begin() -> None:
    deadline = Deadline(began_s=0.0, now_s=990.0, deadline_s=1000.0)
    assert ledger(trials_of(3), deadline).used_up(next_s=11.0) is Stop.DEADLINE
    assert ledger(trials_of(3), deadline).used_up(next_s=9.0) is None


@given(st.integers(1, 60), st.integers(0, 5), st.integers(2, 4))
def test_search_and_finals_together_stay_within_the_budget(trials: int, finalists: int, runs: int) -> None:
    count, _ = search_trials(trials=trials, finalists=finalists, final_runs=runs)
    account = ledger(trials_of(count), trials=trials, finalists=finalists, final_runs=runs)
    assert count + account.plan().trials <= trials
    assert account.plan().trials <= trials / 2
    assert count >= trials / 2


def test_the_finals_keep_their_size_while_they_run() -> None:
    trials = trials_of(28)
    plans = {ledger(with_finals(trials, count), trials=40).plan() for count in range(12)}
    assert plans == {FinalsPlan(3, 3)}
    hours = {ledger(with_finals(trials, count), trials=100, hours=600 / 3600).plan() for count in range(12)}
    assert hours == {FinalsPlan(3, 3)}


def test_a_disturbed_trial_is_repeated_if_the_finals_keep_their_size() -> None:
    trials = trials_of(27)
    shared = replace(trials[5], result=replace(trials[5].result, suspicions=("shared",)))
    trials = (*trials[:5], shared, *trials[6:])
    assert ledger(trials, trials=40).search_is_over() is Stop.TRIALS
    assert ledger(trials, trials=40).next_repeat() is shared
    assert ledger(trials, trials=39).next_repeat() is None
    assert ledger(with_finals(trials, 1), trials=40).next_repeat() is None
    assert ledger(trials, trials=40, finalists=0).next_repeat() is None


def test_lost_attempts_count_as_used_time() -> None:
    account = replace(ledger(trials_of(2), hours=100 / 3600), lost_s=60.0)
    assert account.used_s == 90.0
    assert account.left_s() == pytest.approx(10.0)
    assert ledger(trials_of(2)).left_s() is None


def test_smaller_finals_are_reported() -> None:
    assert shrunk(FinalsPlan(3, 3), FinalsPlan(3, 3), 9) is None
    assert shrunk(FinalsPlan(3, 3), FinalsPlan(1, 3), 1) is None
    assert shrunk(FinalsPlan(0, 0), FinalsPlan(0, 0), 9) is None
    sentence = shrunk(FinalsPlan(3, 3), FinalsPlan(1, 2), 9)
    assert sentence is not None and "3 finalists and the baseline 3 times each do not fit" in sentence
    none = shrunk(FinalsPlan(3, 3), FinalsPlan(0, 0), 9)
    assert none is not None and none.startswith("No finals")


@pytest.mark.parametrize("key", ["finalists", "final_runs", "canary_every"])
def test_finals_and_canaries_that_make_no_sense_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Budget(**{key: -1})
