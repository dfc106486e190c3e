"""Optuna's samplers over the rows: each row is valid, none comes twice, measurements teach, and a resume repeats."""

import warnings
from collections.abc import Callable
from math import log2

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.trial import TrialState

from tests.replay import step_time_ms, sweep_of, table_of
from tuner.core.layout import Layout
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
    chosen = []
    for number in range(trials):
        row = rows.choose(available, number)
        available[row] = False
        rows.tell(row, measured(row) if number % 5 else Observation(state=TrialState.PRUNED))
        chosen.append(row)
    return chosen


@SAMPLERS
def test_every_row_is_chosen_once(sampler: Sampler) -> None:
    trials = len(TABLE) if sampler is optuna_rows.tpe else 12
    assert len(set(searched(OptunaRows(TABLE, sampler, 3), trials))) == trials


@SAMPLERS
def test_after_a_resume_a_sampler_suggests_what_it_would_have_suggested(sampler: Sampler) -> None:
    """A resumed sweep has only the trials, not what the sampler suggested for them."""
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
def test_a_sampler_learns_from_what_was_measured(sampler: Sampler) -> None:
    """After half of the rows were measured, it chooses one of the better rows of the other half."""
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


SIZES = ("tp", "pp", "micro_batch_size")
SWITCHES_AND_TEXTS = ("sp", "recompute_granularity", "recompute_method", "recompute_num_layers")


def nearest(wanted: Layout, available: NDArray[np.bool_]) -> int:
    """The row that is chosen for a suggestion of the layout `wanted`."""
    params = {knob: round(log2(getattr(wanted, knob))) for knob in SIZES}
    params |= {knob: getattr(wanted, knob) for knob in SWITCHES_AND_TEXTS[:3]}
    # A size of 0 counts as 1/2.
    params["recompute_num_layers"] = 0 if wanted.recompute_num_layers else -1
    fixed = {knob: value for knob, value in params.items() if TABLE[knob].nunique() > 1}
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        sampler = PartialFixedSampler(fixed, RandomSampler(0))
    return OptunaRows(TABLE, lambda seed: sampler, 0).choose(available, 0)


def distance(one: Layout, other: Layout) -> float:
    """Doublings and switches between two layouts."""
    doublings: float = sum(abs(log2(getattr(one, knob)) - log2(getattr(other, knob))) for knob in SIZES)
    switches = sum(bool(getattr(one, knob) != getattr(other, knob)) for knob in SWITCHES_AND_TEXTS)
    return doublings + switches


@pytest.mark.parametrize("row", [0, 5, 20])
def test_a_suggestion_becomes_the_row_that_is_the_fewest_doublings_and_switches_away(row: int) -> None:
    wanted = layout_at(TABLE, row)
    everything = np.ones(len(TABLE), dtype=np.bool_)
    assert nearest(wanted, everything) == row
    others = np.arange(len(TABLE)) != row
    distances = [distance(wanted, layout_at(TABLE, other)) for other in range(len(TABLE))]
    assert distances[nearest(wanted, others)] == np.min(np.array(distances)[others])
