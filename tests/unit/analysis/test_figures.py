"""The measured facts of the best layout, or of one trial, compared with its rival and the baseline."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trials import completed_row
from tests.unit.nights import FINALS, NIGHT
from tuner.analysis.figures import best_trial, figures, tied_trials
from tuner.core.layout import Layout


def test_the_best_trial_is_the_fastest_completed_one() -> None:
    assert best_trial(NIGHT) is NIGHT[2]
    assert best_trial([NIGHT[1], NIGHT[4]]) is None
    assert best_trial([]) is None


def test_trials_tie_where_their_intervals_overlap() -> None:
    # 79..81 against 80.5..82.5 overlap; 99..101 lies apart.
    assert [row.number for row in tied_trials(NIGHT)] == [2, 3]
    assert tied_trials([NIGHT[1]]) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(10, 1000), st.floats(0.01, 5)), min_size=1, max_size=8))
def test_no_tie_is_told_apart_by_its_intervals(times: list[tuple[float, float]]) -> None:
    rows = [
        completed_row(number, step, half_interval_ms=half, layout=Layout(micro_batch_size=number + 1))
        for number, (step, half) in enumerate(times)
    ]
    tied = tied_trials(rows)
    assert tied[0] == best_trial(rows)
    fastest = tied[0].result.metrics
    assert fastest is not None
    for row in rows:
        metrics = row.result.metrics
        assert metrics is not None
        apart = metrics.step_time_low_ms > fastest.step_time_high_ms
        assert (row in tied) is not apart


def test_figures_compare_with_the_fastest_other_layout_and_the_baseline() -> None:
    # The winner measured again is no rival of itself.
    again = completed_row(6, 80.2, layout=Layout(tp=2, sp=True))
    facts = figures([*NIGHT, again])
    assert facts is not None and facts.rival is not None and facts.baseline is not None
    assert (facts.trial, facts.rival.trial, facts.baseline.trial) == (2, 3, 0)
    assert facts.rival.is_tie
    assert not facts.baseline.is_tie
    assert facts.baseline.ratio == pytest.approx(100 / 80)
    assert facts.baseline.ratio_low == pytest.approx(99 / 81)
    assert facts.baseline.ratio_high == pytest.approx(101 / 79)


def test_figures_of_a_named_trial_are_its_own() -> None:
    facts = figures(NIGHT, number=3)
    assert facts is not None and facts.rival is not None
    assert (facts.trial, facts.rival.trial) == (3, 2)
    assert facts.rival.ratio < 1
    assert figures(NIGHT, number=1) is None


def test_after_the_finals_their_winner_is_the_best_and_tied_layouts_are_listed_behind_it() -> None:
    trials = [*NIGHT, *FINALS]
    assert best_trial(trials) is FINALS[1]
    assert [trial.layout for trial in tied_trials(trials)] == [Layout(tp=4), Layout(tp=2, sp=True)]


def test_figures_of_finals_hold_all_their_runs() -> None:
    facts = figures([*NIGHT, *FINALS])
    assert facts is not None and facts.baseline is not None
    assert (facts.trial, facts.final_runs, len(facts.metrics.step_times_ms)) == (11, 2, 6)
    assert facts.baseline.ratio == pytest.approx(100.25 / 80.25, rel=1e-3)
    assert (
        "6 timed steps in 2 interleaved runs; the fastest other layout, t0015" in facts.certainty_sentence()
    )
    assert "(95% interval 1." in facts.gain_sentence()
