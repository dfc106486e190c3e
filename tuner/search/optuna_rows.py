"""Optuna's own samplers over the rows of the table: each suggestion is replaced by the nearest row that is left."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.core.columns import Floats
from tuner.core.layout import KNOBS
from tuner.search.encoding import doublings
from tuner.search.observation import Observation
from tuner.search.strategy import Mask, Strategy

STARTUP_TRIALS: Final = 5
"""Random trials before the Gaussian process starts. Assumed: Optuna's default of 10 is half the rows of many spaces."""


def tpe(seed: int) -> BaseSampler:
    """Return Optuna's tree-structured Parzen estimator with its default options."""
    return optuna.samplers.TPESampler(seed=seed)


def gaussian_process(seed: int) -> BaseSampler:
    """Return Optuna's Gaussian process, which starts after STARTUP_TRIALS random trials."""
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


class OptunaRows(Strategy):
    """An Optuna sampler over the knobs that vary, with sizes in doublings, and switches and texts as categories.

    The sampler learns from the rows that were measured, not from the points that it suggested. Each trial gets a new
    study, made from the measured rows and seeded by the trial's number, so a resumed sweep suggests the same rows.

    Args:
        table: The valid layouts, one row per layout, columns as KNOBS.
        sampler: Makes the sampler from a seed.
        seed: The sweep's random seed.
    """

    def __init__(self, table: pd.DataFrame, sampler: Callable[[int], BaseSampler], seed: int) -> None:
        self._sampler, self._seed = sampler, seed
        self._space: dict[str, BaseDistribution] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        for knob in KNOBS:
            column = table[knob]
            if column.nunique() < 2:
                continue
            if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
                sizes = doublings(column)
                self._columns[knob] = sizes
                self._space[knob] = IntDistribution(round(sizes.min()), round(sizes.max()))
            else:
                self._columns[knob] = column.to_numpy(dtype=object)
                self._space[knob] = CategoricalDistribution(sorted(column.unique().tolist()))
        self._ended: list[FrozenTrial] = []

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        study = optuna.create_study(sampler=self._sampler(seed))
        study.add_trials([*self._ended, *(self._trial(row, TrialState.RUNNING) for row in in_flight)])
        suggestion = study.ask(self._space).params
        rows = np.flatnonzero(available)
        return int(rows[self._distance(rows, suggestion).argmin()])

    def tell(self, row: int, observation: Observation) -> None:
        """See Strategy."""
        # The logarithm keeps one very slow row from hiding the differences between all other rows.
        value = None if observation.step_time_ms is None else float(np.log(observation.step_time_ms))
        self._ended.append(self._trial(row, observation.state, value))

    def _trial(self, row: int, state: TrialState, value: float | None = None) -> FrozenTrial:
        params = {
            knob: round(column[row]) if isinstance(self._space[knob], IntDistribution) else column[row]
            for knob, column in self._columns.items()
        }
        return create_trial(state=state, value=value, params=params, distributions=self._space)

    def _distance(self, rows: NDArray[np.intp], suggestion: dict[str, Any]) -> Floats:
        """Return each row's distance from a suggestion: doublings between sizes, plus 1 per other switch or text."""
        distance = np.zeros(len(rows))
        for knob, column in self._columns.items():
            if isinstance(self._space[knob], IntDistribution):
                distance += np.abs(column[rows] - suggestion[knob])
            else:
                distance += column[rows] != suggestion[knob]
        return distance
