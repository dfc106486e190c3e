"""The answer: finals decide, ties are called ties, and layouts that fail or train differently are out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trials import completed_row, failed_row
from tuner.analysis.answer import answer
from tuner.analysis.runs import counting_trials
from tuner.core.layout import Layout
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial

START, FAST, FASTER = Layout(tp=8), Layout(tp=2), Layout(tp=4)
SEARCH = [
    completed_row(0, 100.0, layout=START, source="baseline"),
    completed_row(1, 90.0, layout=FAST),
    completed_row(2, 80.0, layout=FASTER),
]


def final(number: int, layout: Layout, step_ms: float) -> FinishedTrial:
    return completed_row(number, step_ms, layout=layout, source="final", half_interval_ms=0.1)


def finals(*rounds: Sequence[tuple[Layout, float]]) -> list[FinishedTrial]:
    runs = [run for of_round in rounds for run in of_round]
    return [final(10 + place, layout, ms) for place, (layout, ms) in enumerate(runs)]


ROUNDS = finals(
    [(FASTER, 90.0), (FAST, 85.0), (START, 100.0)],
    [(START, 100.4), (FAST, 85.2), (FASTER, 89.8)],
    [(FASTER, 90.1), (FAST, 84.9), (START, 99.8)],
)


def test_the_finals_decide_and_not_the_search_that_picked_a_lucky_run() -> None:
    before, after = answer(SEARCH), answer([*SEARCH, *ROUNDS])
    assert before is not None and after is not None
    assert (before.best.layout, before.is_final) == (FASTER, False)
    assert (after.best.layout, after.is_final) == (FAST, True)
    assert [standing.layout for standing in after.ranking] == [FAST, FASTER, START]
    assert after.best.metrics.step_time_ms == pytest.approx(85.0)
    assert len(after.best.metrics.step_times_ms) == 9
    assert after.best.trial.number == 11
    assert after.baseline is not None
    assert after.baseline.over_best.value == pytest.approx(100 / 85)
    assert 1.15 < after.baseline.over_best.low < 100 / 85 < after.baseline.over_best.high < 1.20
    assert after.tied == (after.best,)


def test_throughput_follows_the_pooled_step_time() -> None:
    ranked = answer([*SEARCH, *ROUNDS])
    assert ranked is not None
    pooled, middle = ranked.best.metrics, ranked.best.trial.result.metrics
    assert middle is not None
    assert pooled.tokens_per_s_per_gpu * pooled.step_time_ms == pytest.approx(
        middle.tokens_per_s_per_gpu * middle.step_time_ms
    )


def test_layouts_that_differ_by_less_than_their_runs_tie() -> None:
    rows = finals(
        [(FASTER, 90.0), (FAST, 89.0), (START, 120.0)],
        [(START, 121.0), (FAST, 91.0), (FASTER, 89.5)],
    )
    ranked = answer([*SEARCH, *rows])
    assert ranked is not None
    assert {standing.layout for standing in ranked.tied} == {FAST, FASTER}


def test_finals_count_only_once_every_finalist_ran_and_while_nothing_is_searched_after_them() -> None:
    ranked = answer([*SEARCH, *ROUNDS[:2]])
    assert ranked is not None and not ranked.is_final
    ranked = answer([*SEARCH, *ROUNDS[:3]])
    assert ranked is not None and ranked.is_final
    ranked = answer([*SEARCH, *ROUNDS, completed_row(30, 70.0, layout=Layout(pp=2))])
    assert ranked is not None and not ranked.is_final
    assert ranked.best.layout == Layout(pp=2)


def test_a_finalist_that_fails_is_out_and_the_answer_says_so() -> None:
    failed = replace(failed_row(13, Outcome.NAN, "loss nan", source="final"), layout=FAST)
    ranked = answer([*SEARCH, *ROUNDS[:3], failed])
    assert ranked is not None
    assert ranked.best.layout == FASTER
    assert ranked.out == {FAST: "failed in the final t0013: nan: loss nan"}


def test_an_interrupted_final_puts_no_layout_out() -> None:
    stopped = replace(failed_row(13, Outcome.INTERRUPTED, source="final"), layout=FAST)
    ranked = answer([*SEARCH, *ROUNDS[:3], stopped])
    assert ranked is not None
    assert (ranked.best.layout, dict(ranked.out)) == (FAST, {})


def test_a_final_that_ran_out_of_memory_beside_others_puts_no_layout_out() -> None:
    failed = failed_row(13, Outcome.OOM, source="final")
    beside = replace(failed.result, occupied_gpus=("others held 20.00 GiB of GPU 0 (processes: 77)",))
    ranked = answer([*SEARCH, *ROUNDS[:3], replace(failed, layout=FAST, result=beside)])
    assert ranked is not None
    assert (ranked.best.layout, dict(ranked.out)) == (FAST, {})


def losing(row: FinishedTrial, *losses: float) -> FinishedTrial:
    assert row.result.metrics is not None
    return replace(row, result=replace(row.result, metrics=replace(row.result.metrics, losses=losses)))


def test_a_layout_that_trains_differently_is_out_with_the_figures() -> None:
    rows = [SEARCH[0], SEARCH[1], losing(SEARCH[2], 5.5, 5.4, 5.0)]
    ranked = answer(rows)
    assert ranked is not None
    assert ranked.best.layout == FAST
    assert ranked.out[FASTER] == (
        "trains differently: in step 3 of t0002 the loss is 5, the baseline's (t0000) 5.3: 5.66% apart, more than the "
        "0.005 that bf16 explains"
    )


def disturbed(row: FinishedTrial) -> FinishedTrial:
    return replace(row, result=replace(row.result, suspicions=("another process kept 1.5 cores busy",)))


def test_a_repeat_takes_the_place_of_the_disturbed_measurement() -> None:
    again = completed_row(3, 70.0, layout=FAST, source="repeat")
    rows = [SEARCH[0], disturbed(SEARCH[1]), SEARCH[2], again]
    ranked = answer(rows)
    assert ranked is not None
    assert (ranked.best.layout, ranked.best.trial.number, ranked.doubts) == (FAST, 3, ())
    assert [row.number for row in counting_trials(rows).values()] == [0, 3, 2]


def test_of_two_disturbed_measurements_the_faster_counts_and_is_doubted() -> None:
    again = disturbed(completed_row(3, 95.0, layout=FASTER, source="repeat"))
    ranked = answer([*SEARCH[:2], disturbed(SEARCH[2]), again])
    assert ranked is not None
    assert ranked.best.trial.number == 2
    assert ranked.doubts == ("t0002 tp4 pp1 mbs1: another process kept 1.5 cores busy",)


def test_a_repeat_that_fails_leaves_the_first_measurement() -> None:
    again = replace(failed_row(3, source="repeat"), layout=FASTER)
    assert counting_trials([*SEARCH[:2], disturbed(SEARCH[2]), again])[2].number == 2


def test_the_search_ranks_with_the_drift_taken_out() -> None:
    canaries = [
        completed_row(minute, 100.0 * 1.1 ** (minute / 30), layout=START, source="canary")
        for minute in (10, 20, 30)
    ]
    # The machine slows by 10%: 84 ms at its end are 76.4 ms at its start. The 80 ms were measured after two minutes.
    rows = [SEARCH[0], SEARCH[2], *canaries, completed_row(31, 84.0, layout=FAST)]
    ranked = answer(rows)
    assert ranked is not None and ranked.drift is not None and ranked.drift.is_significant
    assert ranked.best.layout == FAST
    assert ranked.ranking[1].over_best.value == pytest.approx(80 / 1.1 ** (2 / 30) * 1.1 / 84, rel=1e-3)


def test_nothing_measured_has_no_answer() -> None:
    assert answer([]) is None
    assert answer([failed_row(0, source="baseline")]) is None


@settings(max_examples=30)
@given(st.lists(st.floats(50, 500), min_size=2, max_size=5), st.integers(1, 4))
def test_intervals_include_their_estimates_and_the_baseline_is_ranked(
    steps_ms: list[float], rounds: int
) -> None:
    layouts = [Layout(micro_batch_size=place + 1) for place in range(len(steps_ms))]
    rows = [
        completed_row(place, ms, layout=layout, source="sampler" if place else "baseline")
        for place, (layout, ms) in enumerate(zip(layouts, steps_ms, strict=True))
    ]
    ran = finals(*([list(zip(layouts[1:] + layouts[:1], steps_ms[1:] + steps_ms[:1], strict=True))] * rounds))
    ranked = answer([*rows, *ran])
    assert ranked is not None and ranked.is_final and ranked.baseline is not None
    times = [standing.metrics.step_time_ms for standing in ranked.ranking]
    assert times == sorted(times)
    for standing in ranked.ranking:
        metrics = standing.metrics
        assert len(standing.runs) == rounds
        assert metrics.step_time_low_ms <= metrics.step_time_ms <= metrics.step_time_high_ms
        assert standing.over_best.low <= standing.over_best.value <= standing.over_best.high
