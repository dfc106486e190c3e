"""An Optuna sampler whose suggestions are rows of the table of valid layouts: never invalid, never twice."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuner.core.layout import KNOBS, Layout
from tuner.search.observation import Observation
from tuner.search.stopping import Certainty
from tuner.search.strategy import Mask, Strategy
from tuner.space.table import layout_at


def distributions(table: pd.DataFrame, tried: Sequence[Layout] = ()) -> dict[str, BaseDistribution]:
    """A categorical distribution for every knob that takes more than one value in the table and the tried layouts."""
    found: dict[str, BaseDistribution] = {}
    for knob in KNOBS:
        values = {value.item() if isinstance(value, np.generic) else value for value in table[knob].unique()}
        values |= {getattr(layout, knob) for layout in tried}
        if len(values) > 1:
            found[knob] = CategoricalDistribution(sorted(values))
    return found


class TableSampler(BaseSampler):
    """Suggests rows of a table as its strategy chooses them, each at most once; safe to share between threads.

    A row is in flight from when it is chosen or taken until its trial is told.

    Args:
        table: The valid layouts, a row each, columns as KNOBS.
        strategy: Chooses among the rows that are left.
        tried: Layouts of earlier trials, which may lie outside a table whose sweep file has changed since.
    """

    def __init__(self, table: pd.DataFrame, strategy: Strategy, tried: Sequence[Layout] = ()) -> None:
        self._table = table
        self._strategy = strategy
        self.space = distributions(table, tried)
        self._available: Mask = np.ones(len(table), dtype=bool)
        self._in_flight: dict[int, int] = {}
        self._lock = threading.RLock()

    @property
    def remaining(self) -> int:
        """Rows that may still be suggested."""
        return int(self._available.sum())

    def is_available(self, row: int) -> bool:
        """Whether a row is neither tried nor pruned."""
        return bool(self._available[row])

    def promises(self, row: int) -> bool:
        """Whether a row that someone proposes is worth a trial, beside what the strategy would choose."""
        with self._lock:
            return self.is_available(row) and self._strategy.promises(row, self._available)

    def certainty(self) -> Certainty | None:
        """How near the best measured row is to the best of all; None where nothing is modelled or measured."""
        with self._lock:
            return self._strategy.certainty(self._available)

    def exclude(self, rows: Mask) -> int:
        """Never suggest the rows of this mask; returns how many of them were still available."""
        with self._lock:
            newly = int((self._available & rows).sum())
            self._available &= ~rows
            return newly

    def take(self, row: int, number: int) -> None:
        """Trial `number` measures this row."""
        with self._lock:
            self._available[row] = False
            self._in_flight[number] = row

    def choose(self, number: int) -> int:
        """The row of trial `number`, from now on in flight.

        Raises:
            ValueError: if no row is left.
        """
        with self._lock:
            if not self.remaining:
                raise ValueError("every row is tried or pruned")
            row = self._strategy.choose(self._available, number, tuple(self._in_flight.values()))
            self.take(row, number)
            return row

    def tell(self, number: int, observation: Observation) -> None:
        """Take in how trial `number` ended, unless that is known, or its layout lies outside the table."""
        with self._lock:
            row = self._in_flight.pop(number, None)
            if row is not None:
                self._strategy.tell(row, observation)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs that vary: a row is chosen whole."""
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The values of the chosen row."""
        return self.params(layout_at(self._table, self.choose(trial.number)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refused: one knob alone says nothing about validity."""
        raise ValueError(f"'{param_name}' is no knob of the table; a row is sampled whole")

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """What Optuna itself knows of a trial's end: enough where nobody tells more."""
        self.tell(trial.number, Observation(state=state, step_time_ms=values[0] if values else None))

    def params(self, layout: Layout) -> dict[str, Any]:
        """A layout as Optuna's parameters: the knobs that vary."""
        return {knob: getattr(layout, knob) for knob in self.space}
