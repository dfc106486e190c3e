"""The answer: finals pooled with an interval that holds, ties called ties, and who trains differently is out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trials import completed_row, failed_row
from tuner.analysis.answer import answer
from tuner.analysis.bootstrap import pooled_log_times
from tuner.analysis.losses import LOSS_TOLERANCE, trains_differently
from tuner.analysis.runs import counting_trials
from tuner.analysis.verdict import verdict
from tuner.core.layout import Layout
from tuner.core.workload import Precision
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
    runs = [run for one in rounds for run in one]
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
    found = answer([*SEARCH, *ROUNDS])
    assert found is not None
    metrics, one = found.best.metrics, found.best.trial.result.metrics
    assert one is not None
    assert metrics.tokens_per_s_per_gpu * metrics.step_time_ms == pytest.approx(
        one.tokens_per_s_per_gpu * one.step_time_ms
    )


def test_layouts_that_differ_by_less_than_their_runs_tie() -> None:
    rows = finals(
        [(FASTER, 90.0), (FAST, 89.0), (START, 120.0)],
        [(START, 121.0), (FAST, 91.0), (FASTER, 89.5)],
    )
    found = answer([*SEARCH, *rows])
    assert found is not None
    assert {standing.layout for standing in found.tied} == {FAST, FASTER}


def test_finals_count_only_once_every_finalist_ran_and_while_nothing_is_searched_after_them() -> None:
    found = answer([*SEARCH, *ROUNDS[:2]])
    assert found is not None and not found.is_final
    found = answer([*SEARCH, *ROUNDS[:3]])
    assert found is not None and found.is_final
    found = answer([*SEARCH, *ROUNDS, completed_row(30, 70.0, layout=Layout(pp=2))])
    assert found is not None and not found.is_final
    assert found.best.layout == Layout(pp=2)


def test_a_finalist_that_fails_is_out_and_the_answer_says_so() -> None:
    failed = replace(failed_row(13, Outcome.NAN, "loss nan", source="final"), layout=FAST)
    found = answer([*SEARCH, *ROUNDS[:3], failed])
    assert found is not None
    assert found.best.layout == FASTER
    assert found.out == {FAST: "failed in the final t0013: nan: loss nan"}


def test_an_interrupted_final_puts_nobody_out() -> None:
    stopped = replace(failed_row(13, Outcome.INTERRUPTED, source="final"), layout=FAST)
    found = answer([*SEARCH, *ROUNDS[:3], stopped])
    assert found is not None
    assert (found.best.layout, dict(found.out)) == (FAST, {})


def losing(row: FinishedTrial, *losses: float) -> FinishedTrial:
    assert row.result.metrics is not None
    return replace(row, result=replace(row.result, metrics=replace(row.result.metrics, losses=losses)))


def test_a_layout_that_trains_differently_is_out_with_the_figures() -> None:
    rows = [SEARCH[0], SEARCH[1], losing(SEARCH[2], 5.5, 5.4, 5.0)]
    found = answer(rows)
    assert found is not None
    assert found.best.layout == FAST
    assert found.out[FASTER] == (
        "trains differently: in step 3 of t0002 the loss is 5, the baseline's (t0000) 5.3: 5.66% apart, more than the "
        "0.005 that bf16 explains"
    )


@given(st.floats(0, 0.05), st.sampled_from(list(LOSS_TOLERANCE)))
def test_losses_may_differ_by_what_the_precision_explains(apart: float, precision: Precision) -> None:
    rows = [losing(SEARCH[0], 5.0, 4.0), losing(SEARCH[1], 5.0, 4.0 * (1 + apart), 3.0)]
    found = trains_differently([replace(row, precision=precision) for row in rows])
    assert (FAST in found) == (apart > LOSS_TOLERANCE[precision] * (1 + 1e-9)) or apart == pytest.approx(
        LOSS_TOLERANCE[precision]
    )


def test_a_program_that_draws_its_own_weights_is_allowed_another_draw_and_no_more() -> None:
    rows = [SEARCH[0], losing(SEARCH[1], 5.5, 5.3)]
    assert FAST in trains_differently(rows)
    assert trains_differently([replace(row, draws_weights=True) for row in rows]) == {}
    lost = [replace(row, draws_weights=True) for row in (SEARCH[0], losing(SEARCH[1], 5.5, 4.0))]
    assert "and weights drawn anew explain" in trains_differently(lost)[FAST]


def test_a_baseline_whose_own_runs_differ_excuses_as_much() -> None:
    again = losing(completed_row(3, 100.0, layout=START, source="canary"), 5.5, 5.0)
    other = losing(SEARCH[1], 5.5, 5.1)
    assert FAST in trains_differently([SEARCH[0], other])
    assert trains_differently([SEARCH[0], other, again]) == {}


def test_where_tokens_are_routed_at_random_losses_say_nothing() -> None:
    rows = [SEARCH[0], losing(SEARCH[1], 5.5, 4.0)]
    assert FAST in trains_differently(rows)
    random = [replace(row, routes_at_random=True) for row in rows]
    assert trains_differently(random) == {}
    assert any("Losses were not compared" in line for line in verdict(random))


def test_without_a_measured_baseline_nobody_is_out() -> None:
    rows = [replace(failed_row(0, source="baseline"), layout=START), SEARCH[1], losing(SEARCH[2], 1.0)]
    assert trains_differently(rows) == {}


def disturbed(row: FinishedTrial) -> FinishedTrial:
    return replace(row, result=replace(row.result, suspicions=("another process kept 1.5 cores busy",)))


def test_a_repeat_takes_the_place_of_the_disturbed_measurement() -> None:
    again = completed_row(3, 70.0, layout=FAST, source="repeat")
    rows = [SEARCH[0], disturbed(SEARCH[1]), SEARCH[2], again]
    found = answer(rows)
    assert found is not None
    assert (found.best.layout, found.best.trial.number, found.doubts) == (FAST, 3, ())
    assert [row.number for row in counting_trials(rows).values()] == [0, 3, 2]


def test_of_two_disturbed_measurements_the_faster_counts_and_is_doubted() -> None:
    again = disturbed(completed_row(3, 95.0, layout=FASTER, source="repeat"))
    found = answer([*SEARCH[:2], disturbed(SEARCH[2]), again])
    assert found is not None
    assert found.best.trial.number == 2
    assert found.doubts == ("t0002 tp4 pp1 mbs1: another process kept 1.5 cores busy",)


def test_a_repeat_that_fails_leaves_the_first_measurement() -> None:
    again = replace(failed_row(3, source="repeat"), layout=FASTER)
    assert counting_trials([*SEARCH[:2], disturbed(SEARCH[2]), again])[2].number == 2


def test_the_search_ranks_with_the_drift_taken_out() -> None:
    canaries = [
        completed_row(minute, 100.0 * 1.1 ** (minute / 30), layout=START, source="canary")
        for minute in (10, 20, 30)
    ]
    # 84 on the machine as it is at the end are 76.4 at its start; the 80 were measured two minutes into the night.
    rows = [SEARCH[0], SEARCH[2], *canaries, completed_row(31, 84.0, layout=FAST)]
    found = answer(rows)
    assert found is not None and found.drift is not None and found.drift.is_significant
    assert found.best.layout == FAST
    assert found.ranking[1].over_best.value == pytest.approx(80 / 1.1 ** (2 / 30) * 1.1 / 84, rel=1e-3)


def test_nothing_measured_has_no_answer() -> None:
    assert answer([]) is None
    assert answer([failed_row(0, source="baseline")]) is None


@settings(max_examples=30)
@given(st.lists(st.floats(50, 500), min_size=2, max_size=5), st.integers(1, 4))
def test_the_interval_holds_the_estimate_and_the_baseline_has_its_place(
    steps_ms: list[float], rounds: int
) -> None:
    layouts = [Layout(micro_batch_size=place + 1) for place in range(len(steps_ms))]
    rows = [
        completed_row(place, ms, layout=layout, source="sampler" if place else "baseline")
        for place, (layout, ms) in enumerate(zip(layouts, steps_ms, strict=True))
    ]
    ran = finals(*([list(zip(layouts[1:] + layouts[:1], steps_ms[1:] + steps_ms[:1], strict=True))] * rounds))
    found = answer([*rows, *ran])
    assert found is not None and found.is_final and found.baseline is not None
    times = [standing.metrics.step_time_ms for standing in found.ranking]
    assert times == sorted(times)
    for standing in found.ranking:
        metrics = standing.metrics
        assert len(standing.runs) == rounds
        assert metrics.step_time_low_ms <= metrics.step_time_ms <= metrics.step_time_high_ms
        assert standing.over_best.low <= standing.over_best.value <= standing.over_best.high


@pytest.mark.parametrize(("layouts", "runs"), [(4, 3), (2, 2)])
def test_layouts_that_are_equal_are_told_apart_once_in_twenty(layouts: int, runs: int) -> None:
    random = np.random.default_rng(3)
    told_apart = covered = 0
    for _ in range(200):
        shifts = random.normal(0, 0.01, (layouts, runs))
        logs = shifts[:, :, None] + random.normal(0, 0.005, (layouts, runs, 10))
        found, draws = pooled_log_times((100 * np.exp(logs)).tolist(), draws=400)
        low, high = found[1] - found[0] + np.quantile(draws[1] - draws[0], [0.025, 0.975])
        told_apart += not low <= 0 <= high
        low, high = found[0] + np.quantile(draws[0], [0.025, 0.975])
        covered += low <= np.log(100) <= high
    assert told_apart <= 20
    assert covered >= 180
