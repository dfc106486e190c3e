"""What a sweep's trials say, on sweeps whose measured step times are a formula of the layout."""

from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from tests.replay import step_time_ms, sweep_of, table_of
from tests.trials import CLUSTER, completed_row, failed_row
from tuner.analysis.figures import best_trial
from tuner.core.choices import value_of
from tuner.core.layout import Layout
from tuner.explain.evidence import Evidence, gather
from tuner.explain.findings import (
    Findings,
    accuracy,
    choice_effects,
    findings,
    predict_layout,
    predicted_trials,
)
from tuner.explain.importance import FEWEST_TRIALS, importances
from tuner.explain.neighbours import Neighbour, NeighbourStatus
from tuner.predict.memory.peak import peak_gib
from tuner.predict.time.step import step_time_ms as predicted_step_time_ms
from tuner.rules.validity import broken_rules
from tuner.space.table import find_row, layout_at
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial

FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
RATIOS = st.lists(st.floats(0.2, 5.0), min_size=1, max_size=20)


def trials_of(*layouts: Layout, scale: float = 1.0) -> list[FinishedTrial]:
    """Completed trials that measure `scale` times the replay's formula."""
    return [
        completed_row(number, scale * step_time_ms(layout), layout=layout)
        for number, layout in enumerate(layouts)
    ]


def evidence_of(trials: list[FinishedTrial], **keys: Any) -> Evidence:
    return gather(sweep_of(**keys), trials)


def by_value(said: Findings) -> dict[tuple[str, str], Neighbour]:
    """The neighbours of the best layout by choice and value."""
    return {(neighbour.choice, neighbour.value): neighbour for neighbour in said.neighbours}


@given(RATIOS, st.floats(0.01, 100.0))
def test_a_factor_that_all_predictions_share_is_no_error(predicted: list[float], factor: float) -> None:
    agreement = accuracy(np.array(predicted), factor * np.array(predicted))
    assert agreement is not None
    assert agreement.factor == pytest.approx(factor)
    assert agreement.error == pytest.approx(0, abs=1e-9)


def test_errors_are_what_remains_once_the_factor_is_taken_out() -> None:
    agreement = accuracy(np.array([1.0, 1.0]), np.array([2.0, 8.0]))
    assert agreement is not None
    assert (agreement.trials, agreement.spearman) == (2, None)
    assert agreement.factor == pytest.approx(4)
    # The measurements are half and twice what predictions times the factor say.
    assert agreement.error == pytest.approx((0.5 + 1.0) / 2)
    assert accuracy(np.array([]), np.array([])) is None


def test_the_rank_correlation_needs_five_trials() -> None:
    predicted = np.array([1.0, 2, 3, 4, 5])
    up, down = accuracy(predicted, predicted**3), accuracy(predicted, 1 / predicted)
    assert up is not None and up.spearman == pytest.approx(1)
    assert down is not None and down.spearman == pytest.approx(-1)
    few, flat = accuracy(predicted[:4], predicted[:4]), accuracy(predicted, np.ones(5))
    assert few is not None and few.spearman is None
    assert flat is not None and flat.spearman is None


def test_every_trial_stands_beside_the_prediction_of_its_layout() -> None:
    sweep = sweep_of()
    trials = [
        *trials_of(Layout(tp=2), Layout(pp=2)),
        replace(failed_row(2), layout=Layout(pp=2, micro_batch_size=2)),
    ]
    table = table_of(sweep)
    for predicted, trial in zip(predicted_trials(gather(sweep, trials)), trials, strict=True):
        row = find_row(table, trial.layout)
        assert row is not None
        assert predicted.trial is trial
        expected_ms = predicted_step_time_ms(table.iloc[[row]], sweep.workload, sweep.cluster)[0]
        assert predicted.predicted_ms == pytest.approx(expected_ms)
        assert predicted.predicted_gib == pytest.approx(
            peak_gib(table.iloc[[row]], sweep.workload, sweep.cluster)[0]
        )
        assert 0 <= predicted.predicted_fit <= 1


def test_shares_find_the_knobs_that_matter_and_need_enough_trials() -> None:
    layouts = [
        Layout(tp=tp, pp=pp, micro_batch_size=m) for tp in (1, 2, 4) for pp in (1, 2) for m in (1, 2, 4)
    ]
    by_tp = importances(layouts, [100.0 * layout.tp for layout in layouts])
    assert max(by_tp, key=lambda choice: by_tp[choice]) == "tp"
    assert by_tp["tp"] > 0.95
    assert sum(by_tp.values()) == pytest.approx(1)
    assert set(by_tp) == {"tp", "pp", "micro_batch_size"}
    by_both = importances(layouts, [50.0 * layout.pp + layout.micro_batch_size for layout in layouts])
    assert by_both["pp"] > by_both["micro_batch_size"] > by_both["tp"]
    few = layouts[: FEWEST_TRIALS - 1]
    assert importances(few, [100.0 * layout.tp for layout in few]) == {}
    assert importances(layouts, [100.0] * len(layouts)) == {}
    assert importances(layouts[:1] * 9, [float(n) for n in range(1, 10)]) == {}


def test_shares_are_those_of_optunas_functional_anova() -> None:
    random = np.random.default_rng(0)
    layouts = [
        Layout(tp=tp, pp=pp, micro_batch_size=m, sp=tp > 1)
        for tp in (1, 2, 4)
        for pp in (1, 2)
        for m in (1, 2, 4)
    ]
    times_ms = [100.0 * layout.tp**0.5 / layout.pp + random.uniform(0, 30) for layout in layouts]
    study = optuna.create_study()
    for layout, ms in zip(layouts, times_ms, strict=True):
        params = {choice: value_of(choice, layout) for choice in ("tp", "pp", "micro_batch_size", "sp")}
        space: dict[str, BaseDistribution] = {
            choice: CategoricalDistribution(sorted({value_of(choice, each) for each in layouts}))
            for choice in params
        }
        study.add_trial(create_trial(value=float(np.log(ms)), params=params, distributions=space))
    wanted = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    shares = importances(layouts, times_ms)
    assert list(shares) == list(wanted)
    assert shares == pytest.approx(wanted, rel=1e-9)


def test_shares_of_choices_with_many_values_are_found_in_finite_time() -> None:
    layouts = [Layout(micro_batch_size=m, pp=pp) for m in range(1, 41) for pp in (1, 2, 4)]
    shares = importances(layouts, [100.0 + layout.micro_batch_size for layout in layouts])
    assert shares["micro_batch_size"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_effects_are_the_measured_ratios_of_pairs_that_differ_in_one_choice() -> None:
    layouts = [Layout(tp=tp, micro_batch_size=m) for tp in (1, 2) for m in (1, 2)]
    table = table_of(sweep_of())
    rows = np.array([find_row(table, layout) for layout in layouts], dtype=np.intp)
    # The strongest effect comes first.
    tp, micro = choice_effects(table, rows, np.array([100.0, 80.0, 50.0, 45.0]))
    assert (tp.choice, tp.before, tp.after, tp.pairs) == ("tp", "1", "2", 2)
    assert tp.change == pytest.approx((0.5 * 45 / 80) ** 0.5 - 1)
    assert (micro.choice, micro.before, micro.after, micro.pairs) == ("micro_batch_size", "1", "2", 2)
    assert micro.change == pytest.approx((0.8 * 0.9) ** 0.5 - 1)


def test_layouts_that_differ_in_two_choices_make_no_effect() -> None:
    table = table_of(sweep_of())
    rows = np.array([find_row(table, x) for x in (Layout(), Layout(tp=2, pp=2))], dtype=np.intp)
    assert choice_effects(table, rows, np.array([1.0, 2.0])) == ()


def test_neighbours_cost_what_was_measured_of_them() -> None:
    layouts = [Layout(tp=2, micro_batch_size=4), Layout(tp=2, micro_batch_size=2), Layout(micro_batch_size=4)]
    near = by_value(findings(evidence_of(trials_of(*layouts))))
    fastest_ms = step_time_ms(layouts[0])
    for key, layout, number in ((("micro_batch_size", "2"), layouts[1], 1), (("tp", "1"), layouts[2], 2)):
        assert near[key].known is NeighbourStatus.MEASURED
        assert near[key].cost == pytest.approx(step_time_ms(layout) / fastest_ms - 1)
        assert near[key].why == f"trial {number}"
        assert near[key].layout == layout


def test_untried_neighbours_cost_what_the_trials_make_of_the_prediction() -> None:
    start = Layout(tp=2, micro_batch_size=4)
    evidence = evidence_of(trials_of(start))
    near = by_value(findings(evidence))
    other = near["pp", "2"]
    assert other.known is NeighbourStatus.PREDICTED
    row, best_row = (find_row(evidence.table, layout) for layout in (other.layout, start))
    assert row is not None and best_row is not None
    # One trial teaches a factor that all rows share, which leaves the predicted ratio as it is.
    predicted = evidence.predicted_ms[row] / evidence.predicted_ms[best_row] - 1
    assert other.cost == pytest.approx(predicted, abs=0.03)
    assert set(near) == {
        *(("tp", value) for value in ("1", "4")),
        ("pp", "2"),
        *(("micro_batch_size", value) for value in ("1", "2")),
        ("recompute", "full:uniform:1"),
    }


def test_the_cheapest_neighbours_come_first_and_those_that_cannot_run_last() -> None:
    trials = [*trials_of(Layout(tp=2, micro_batch_size=4)), failed_row(1)]
    costs = [neighbour.cost for neighbour in findings(evidence_of(trials)).neighbours]
    runnable = [cost for cost in costs if cost is not None]
    assert costs == [*sorted(runnable), *[None] * (len(costs) - len(runnable))]


def with_oom(layout: Layout, number: int = 1) -> list[FinishedTrial]:
    return [*trials_of(Layout(tp=2)), replace(failed_row(number), layout=layout)]


def test_a_neighbour_that_ran_out_of_memory_and_what_it_rules_out_have_no_cost() -> None:
    near = by_value(findings(evidence_of(with_oom(Layout(tp=2, micro_batch_size=2)))))
    tried, above = near["micro_batch_size", "2"], near["micro_batch_size", "4"]
    assert (tried.known, tried.cost, tried.why) == (NeighbourStatus.FAILED, None, "trial 1: oom")
    assert (above.known, above.cost) == (NeighbourStatus.RULED_OUT, None)
    assert above.why == "needs as much memory as trial 1"


def test_a_neighbour_that_was_given_up_costs_at_least_its_bound() -> None:
    start = trials_of(Layout(tp=2))
    assert start[0].result.metrics is not None
    bound_ms = 1.5 * start[0].result.metrics.step_time_ms
    ended = replace(failed_row(1, Outcome.TOO_SLOW), layout=Layout(tp=2, micro_batch_size=2))
    ended = replace(ended, result=replace(ended.result, slower_than_ms=bound_ms))
    tried = by_value(findings(evidence_of([*start, ended])))["micro_batch_size", "2"]
    assert tried.known is NeighbourStatus.SLOWER
    assert tried.cost == pytest.approx(0.5)
    assert tried.why == "trial 1: at least, too_slow"


def test_a_neighbour_that_is_predicted_not_to_fit_is_too_large() -> None:
    # On CPU there are no context and workspaces of CUDA, which are larger than this model.
    start, cpu = Layout(tp=2, **FULL), replace(CLUSTER, device="cpu")
    peak = predict_layout(gather(sweep_of(cpu), [], [start]), start).memory.total_gib
    small = replace(cpu, gpu=replace(cpu.gpu, memory_gib=1.2 * peak))
    said = findings(gather(sweep_of(small), trials_of(start)))
    large = [neighbour for neighbour in said.neighbours if neighbour.known is NeighbourStatus.TOO_LARGE]
    assert large
    assert all(neighbour.cost is None and "P(fit)" in neighbour.why for neighbour in large)


def test_values_that_rules_forbid_are_listed_with_these_rules() -> None:
    sweep = sweep_of(knobs={"tp": [1, 2, 3], "pp": [1, 2], "micro_batch_size": [1, 32]})
    near = by_value(findings(gather(sweep, trials_of(Layout(tp=2)))))
    for key, layout in (
        (("tp", "3"), Layout(tp=3)),
        (("micro_batch_size", "32"), Layout(tp=2, micro_batch_size=32)),
    ):
        assert near[key].known is NeighbourStatus.INVALID
        broken = broken_rules(layout, sweep.workload, sweep.cluster)
        assert near[key].why == ", ".join(item.rule for item in broken)


def test_a_best_layout_outside_the_space_has_neighbours_there_and_says_what_is_not_searched() -> None:
    sweep = sweep_of(knobs={"tp": [1, 2]}, baseline={"tp": 2, "pp": 2})
    said = findings(gather(sweep, trials_of(Layout(tp=2, pp=2))))
    (outside,) = (neighbour for neighbour in said.neighbours if neighbour.known is NeighbourStatus.OUTSIDE)
    assert (outside.choice, outside.value, outside.cost) == ("tp", "1", None)
    assert {neighbour.choice for neighbour in said.neighbours} == {"tp", "pp"}


def test_the_parts_of_a_prediction_sum_to_what_is_predicted() -> None:
    evidence = evidence_of(trials_of(Layout(tp=2), Layout(pp=2), scale=7.0))
    for row in range(0, len(evidence.table), 5):
        expected = predict_layout(evidence, layout_at(evidence.table, row))
        assert expected.step.total_ms == pytest.approx(evidence.predicted_ms[row])
        assert expected.memory.total_gib == pytest.approx(evidence.predicted_gib[row])
        assert expected.expected_ms == evidence.expected_ms[row]


def test_trials_correct_what_is_expected_of_their_own_layouts() -> None:
    trials = trials_of(*(Layout(tp=tp, pp=pp) for tp in (1, 2, 4) for pp in (1, 2)))
    evidence = evidence_of(trials)
    measured = np.array([step_time_ms(trial.layout) for trial in trials])
    before = np.abs(np.log(evidence.predicted_ms[evidence.rows] / measured))
    after = np.abs(np.log(evidence.expected_ms[evidence.rows] / measured))
    assert after.mean() < before.mean() / 3


def test_without_a_completed_trial_there_is_no_best_and_no_accuracy() -> None:
    said = findings(evidence_of([failed_row(0)]))
    assert said.time is None and said.memory is None and said.best is None
    assert not said.neighbours and not said.effects
    assert len(said.predicted_trials) == 1
    assert findings(evidence_of([])).predicted_trials == ()


def test_on_an_exhausted_sweep_no_neighbour_of_the_best_is_faster_and_all_are_measured() -> None:
    sweep = sweep_of()
    table = table_of(sweep)
    trials = trials_of(*(layout_at(table, row) for row in range(len(table))))
    said = findings(gather(sweep, trials))
    fastest = best_trial(trials)
    assert fastest is not None and said.best is not None
    assert said.best.layout == fastest.layout
    *measured, invalid = said.neighbours
    assert {neighbour.known for neighbour in measured} == {NeighbourStatus.MEASURED}
    assert all(neighbour.cost is not None and neighbour.cost >= 0 for neighbour in measured)
    # With tp 1 on 8 GPUs, 8 ranks take micro-batches of 4 at once: more than the 16 samples of a step.
    assert (invalid.choice, invalid.value, invalid.why) == ("tp", "1", "batch-by-micro-batch")
    # In the formula, recompute costs 30% whatever the other choices are.
    (recompute,) = (effect for effect in said.effects if effect.choice == "recompute")
    assert recompute.change == pytest.approx(0.3)
    assert set(said.importances) == {"tp", "pp", "micro_batch_size", "recompute"}
