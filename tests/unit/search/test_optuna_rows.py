"""Optuna's samplers over the rows: valid, never twice, taught by what was measured, the same after a resume."""

from collections.abc import Callable

import numpy as np
import pytest
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from tests.replay import step_time_ms, sweep_of, table_of
from tuner.search import optuna_rows
from tuner.search.observation import Observation
from tuner.search.optuna_rows import OptunaRows
from tuner.space.table import layout_at

TABLE = table_of(sweep_of())
TRUTH_MS = np.array([step_time_ms(layout_at(TABLE, row)) for row in range(len(TABLE))])
SAMPLERS = pytest.mark.parametrize("sampler", [optuna_rows.tpe, optuna_rows.gaussian_process])
Sampler = Callable[[int], BaseSampler]


def measured(row: int) -> Observation:
    return Observation(state=TrialState.COMPLETE, step_time_ms=float(TRUTH_MS[row]))


def searched(rows: OptunaRows, trials: int) -> list[int]:
    available = np.ones(len(TABLE), dtype=np.bool_)
    found = []
    for number in range(trials):
        row = rows.choose(available, number)
        available[row] = False
        rows.tell(row, measured(row) if number % 5 else Observation(state=TrialState.PRUNED))
        found.append(row)
    return found


@SAMPLERS
def test_every_row_is_chosen_once(sampler: Sampler) -> None:
    trials = len(TABLE) if sampler is optuna_rows.tpe else 12
    assert len(set(searched(OptunaRows(TABLE, sampler, 3), trials))) == trials


@SAMPLERS
def test_a_sampler_that_is_told_the_same_goes_on_the_same(sampler: Sampler) -> None:
    """Without what it asked for in between: a resumed sweep has only the trials."""
    first, resumed = OptunaRows(TABLE, sampler, 3), OptunaRows(TABLE, sampler, 3)
    rows = searched(first, 12)
    for number, row in enumerate(rows):
        resumed.tell(row, measured(row) if number % 5 else Observation(state=TrialState.PRUNED))
    available = ~np.isin(np.arange(len(TABLE)), rows)
    assert resumed.choose(available, 12) == first.choose(available, 12)


@SAMPLERS
def test_another_seed_begins_elsewhere(sampler: Sampler) -> None:
    available = np.ones(len(TABLE), dtype=np.bool_)
    assert len({OptunaRows(TABLE, sampler, seed).choose(available, 0) for seed in range(8)}) > 2


@SAMPLERS
def test_what_was_measured_is_learnt(sampler: Sampler) -> None:
    """Of the half that is left after thirty trials' lesson, it takes the better rows first."""
    better = []
    for seed in range(5):
        rows, random = OptunaRows(TABLE, sampler, seed), np.random.default_rng(seed)
        taught = random.permutation(len(TABLE))[: len(TABLE) // 2]
        for row in taught:
            rows.tell(int(row), measured(int(row)))
        left = ~np.isin(np.arange(len(TABLE)), taught)
        chosen = rows.choose(left, 17)
        better.append((TRUTH_MS[left] < TRUTH_MS[chosen]).mean())
    assert np.mean(better) < 0.3


@SAMPLERS
def test_rows_in_flight_are_known_to_it(sampler: Sampler) -> None:
    rows = OptunaRows(TABLE, sampler, 3)
    for row in range(12):
        rows.tell(row, measured(row))
    available = np.arange(len(TABLE)) > 11
    first = rows.choose(available, 12)
    available[first] = False
    assert rows.choose(available, 13, [first]) != first


def test_a_suggestion_falls_to_the_row_that_is_fewest_doublings_and_switches_away() -> None:
    rows = OptunaRows(TABLE, optuna_rows.tpe, 0)
    wanted = {knob: (column[5]) for knob, column in rows._columns.items()}
    distance = rows._distance(np.arange(len(TABLE)), wanted)
    assert distance.argmin() == 5
    assert distance[5] == 0
    own = layout_at(TABLE, 5)
    for row in range(len(TABLE)):
        other = layout_at(TABLE, row)
        if other.recompute_granularity == own.recompute_granularity:
            apart = sum(
                abs(np.log2(getattr(own, knob)) - np.log2(getattr(other, knob)))
                for knob in ("tp", "pp", "micro_batch_size")
            )
            assert distance[row] == pytest.approx(apart + (own.sp != other.sp))
