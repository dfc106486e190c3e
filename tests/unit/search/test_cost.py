"""The cost of a trial is learnt from the trials that completed, and weighed against what a row promises."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import TrialState

from tests.trials import completed_row, failed_row
from tuner.search.cost import TrialCost, trial_cost
from tuner.search.observation import Observation
from tuner.search.ranking import Ranking
from tuner.trial.contract import Measurement, Outcome, RankRecord


def completed(fixed_s: float, steps: int) -> Observation:
    return Observation(state=TrialState.COMPLETE, step_time_ms=100.0, fixed_s=fixed_s, steps=steps)


MEASUREMENT = Measurement(warmup_steps=4, min_steps=5, max_steps=9)


def test_before_the_first_trial_only_the_steps_cost_time() -> None:
    assert trial_cost([], MEASUREMENT) == TrialCost(fixed_s=0.0, steps=9)


def test_the_fixed_cost_and_the_steps_are_the_medians_of_completed_trials() -> None:
    cost = trial_cost([completed(10, 9), completed(100, 13), completed(12, 11)], MEASUREMENT)
    assert cost == TrialCost(fixed_s=12, steps=11)


def test_trials_that_failed_do_not_count() -> None:
    failed = Observation(state=TrialState.PRUNED, fixed_s=500.0)
    assert trial_cost([failed], MEASUREMENT) == trial_cost([], MEASUREMENT)
    assert trial_cost([failed, completed(10, 5)], MEASUREMENT).fixed_s == 10


def test_the_fixed_cost_of_a_result_is_its_duration_without_the_steps() -> None:
    observation = Observation.of(completed_row(0, 100.0).result)
    assert (observation.fixed_s, observation.steps) == (15.0 - 2.0 - 3.0, 6)
    assert Observation.of(failed_row(0).result).out_of_memory


def test_a_trial_that_was_stopped_as_too_slow_gives_a_bound_and_its_peak() -> None:
    ranks = tuple(
        RankRecord(rank=rank, host="here", phase="teardown", step=6, peak_allocated_gib=peak_gib)
        for rank, peak_gib in enumerate([10.0, 12.5])
    )
    failed = failed_row(0, Outcome.TOO_SLOW).result
    observation = Observation.of(replace(failed, ranks=ranks, slower_than_ms=120.0))
    assert (observation.state, observation.step_time_ms, observation.slower_than_ms) == (
        TrialState.PRUNED,
        None,
        120.0,
    )
    assert observation.peak_gib == 12.5
    timed_out = replace(failed, outcome=Outcome.TIMEOUT, ranks=ranks, slower_than_ms=120.0)
    assert Observation.of(timed_out).peak_gib is None, "it may not have reached its peak"


def test_seconds_are_the_fixed_cost_and_the_steps() -> None:
    assert TrialCost(fixed_s=20.0, steps=10).seconds(np.array([100.0, 2000.0])) == pytest.approx([21, 40])


def test_rows_with_cheaper_steps_come_first_unless_the_fixed_cost_dominates() -> None:
    """The steps of row 1 are expected to take 1.3 times as long as the steps of row 2."""
    features = np.array([[0.0], [30.0], [60.0]])
    ranking = Ranking(features, np.array([100.0, 130.0, 101.0]))
    ranking.tell(0, 100.0)
    rows = np.array([1, 2])
    ranking.cost = TrialCost(fixed_s=0.0, steps=10)
    by_steps = ranking.score(rows)
    ranking.cost = TrialCost(fixed_s=1e6, steps=10)
    by_trial = ranking.score(rows)
    assert by_steps[0] / by_steps[1] == pytest.approx(by_trial[0] / by_trial[1] * 101 / 130, rel=0.05)
    assert by_steps[0] / by_steps[1] < by_trial[0] / by_trial[1]
