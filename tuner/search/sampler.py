"""An Optuna sampler that suggests rows of the table of valid layouts: never an invalid one, and none twice."""

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
    """Return a categorical distribution for each knob with more than one value in the table and the tried layouts."""
    space: dict[str, BaseDistribution] = {}
    for knob in KNOBS:
        values = {value.item() if isinstance(value, np.generic) else value for value in table[knob].unique()}
        values |= {getattr(layout, knob) for layout in tried}
        if len(values) > 1:
            space[knob] = CategoricalDistribution(sorted(values))
    return space


class TableSampler(BaseSampler):
    """Suggests the rows of a table that its strategy chooses, each at most once; threads may share it.

    A row is in flight from the moment that it is chosen or taken until `tell` reports its trial.

    Args:
        table: The valid layouts, one row per layout, columns as KNOBS.
        strategy: Chooses among the rows that are left.
        tried: Layouts of earlier trials; they may lie outside the table if the sweep file has changed since.
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
        """The number of rows that may still be suggested."""
        return int(self._available.sum())

    def is_available(self, row: int) -> bool:
        """Return whether a row is neither tried nor pruned."""
        return bool(self._available[row])

    def promises(self, row: int) -> bool:
        """Return whether a proposed row is left and worth a trial, compared with the strategy's own choice."""
        with self._lock:
            return self.is_available(row) and self._strategy.promises(row, self._available)

    def certainty(self) -> Certainty | None:
        """Return how near the best measured row is to the best of all; None if nothing is modelled or measured."""
        with self._lock:
            return self._strategy.certainty(self._available)

    def exclude(self, rows: Mask) -> int:
        """Never suggest the rows of this mask from now on; return how many of them were still available."""
        with self._lock:
            newly = int((self._available & rows).sum())
            self._available &= ~rows
            return newly

    def take(self, row: int, number: int) -> None:
        """Note that trial `number` measures this row, which is in flight from now on."""
        with self._lock:
            self._available[row] = False
            self._in_flight[number] = row

    def choose(self, number: int) -> int:
        """Choose the row that trial `number` measures, which is in flight from now on, and return it.

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
        """Learn how trial `number` ended; ignore it if that is known already or its layout is outside the table."""
        with self._lock:
            row = self._in_flight.pop(number, None)
            if row is not None:
                self._strategy.tell(row, observation)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all knobs that vary, because a row is chosen as a whole."""
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose a row and return the values of its knobs."""
        return self.params(layout_at(self._table, self.choose(trial.number)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: one knob alone does not say whether a layout is valid."""
        raise ValueError(f"'{param_name}' is no knob of the table; a row is sampled as a whole")

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Learn what Optuna itself knows about the end of a trial, which is enough if nobody calls `tell`."""
        self.tell(trial.number, Observation(state=state, step_time_ms=values[0] if values else None))

    def params(self, layout: Layout) -> dict[str, Any]:
        """Return a layout as Optuna's parameters: the values of the knobs that vary."""
        return {knob: getattr(layout, knob) for knob in self.space}
