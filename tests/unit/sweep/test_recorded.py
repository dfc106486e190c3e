"""On the recorded landscapes, several trials at a time: a sweep over what was really measured."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.bench.landscape import Landscape, landscapes
from tests.drive import Drive
from tests.replay import TRIAL_S
from tests.trials import metrics_of
from tuner.space.table import RowIndex
from tuner.sweep.budget import Stop
from tuner.trial.contract import Durations, Outcome, TrialResult, TrialSpec
from tuner.trial.finished import SEARCHED


def recorded(landscape: Landscape) -> Callable[[TrialSpec], TrialResult]:
    """The machine on which a landscape was measured: each trial ends as its layout's did."""
    rows = RowIndex(landscape.table)

    def machine(spec: TrialSpec) -> TrialResult:
        row = rows.find(spec.layout)
        assert row is not None
        step_ms = float(landscape.median_ms[row])
        durations = Durations(total_s=TRIAL_S)
        if np.isnan(step_ms):
            return TrialResult(outcome=Outcome.OOM, reason="recorded", durations=durations)
        metrics = metrics_of(step_ms, half_interval_ms=step_ms / 100, peak_gib=float(landscape.peak_gib[row]))
        return TrialResult(outcome=Outcome.COMPLETED, reason="recorded", metrics=metrics, durations=durations)

    return machine


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("landscape", list(landscapes()), ids=lambda landscape: landscape.sweep.name)
def test_several_at_a_time_find_a_layout_near_the_best_and_none_runs_twice(
    landscape: Landscape, slots: int
) -> None:
    budget = replace(landscape.sweep.budget, trials=16, min_gain=None, finalists=2, final_runs=2)
    drive = Drive(sweep=replace(landscape.sweep, budget=budget), machine=recorded(landscape), slots=slots)
    assert drive.to_end() is Stop.TRIALS
    assert len(drive.state.ended) == 16
    searched = [trial.layout for trial in drive.launched if trial.source.source in SEARCHED]
    assert len(searched) == len(set(searched))
    assert len(drive.launched) == 16
    best_ms = min(trial.result.metrics.step_time_ms for trial in drive.state.ended if trial.result.metrics)
    assert best_ms <= 1.05 * np.nanmin(landscape.median_ms)
