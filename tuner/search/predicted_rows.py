"""The strategy of a sweep: rank by predicted step time, and learn step time, memory and cost from every trial."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.predict.feasibility import Feasibility
from tuner.search.cost import trial_cost
from tuner.search.observation import Observation
from tuner.search.ranking import Ranking, encode
from tuner.search.stopping import Certainty
from tuner.search.strategy import Mask, Strategy
from tuner.trial.contract import Measurement

PROMISING: Final = 0.5
"""A proposed row is tried before the best one if its score is at least this share of that one's."""


class PredictedRows(Strategy):
    """The best predicted row first, then the greatest expected improvement on what was measured.

    Args:
        table: The valid layouts, a row each, columns as KNOBS.
        predicted_ms: The predicted step time of every row.
        feasibility: Whether rows fit the GPU's memory; None where all do.
        measurement: How long a trial measures.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        predicted_ms: NDArray[np.float64],
        feasibility: Feasibility | None = None,
        measurement: Measurement | None = None,
    ) -> None:
        self._measurement, self._feasibility = measurement or Measurement(), feasibility
        self._ranking = Ranking(
            encode(table), predicted_ms, None if feasibility is None else feasibility.probabilities()
        )
        self._observations: list[Observation] = []
        self._stale = False

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        return self._current().choose(available, in_flight)

    def tell(self, row: int, observation: Observation) -> None:
        """See Strategy."""
        self._observations.append(observation)
        if observation.step_time_ms is not None:
            self._ranking.tell(row, observation.step_time_ms)
        elif observation.slower_than_ms is not None:
            self._ranking.tell_slower(row, observation.slower_than_ms)
        if self._feasibility is not None and (observation.out_of_memory or observation.peak_gib is not None):
            self._feasibility.tell(row, observation.peak_gib)
        self._stale = True

    def promises(self, row: int, available: Mask) -> bool:
        """See Strategy."""
        ranking = self._current()
        rows = np.array([row, ranking.choose(available)])
        own, best = ranking.score(rows)
        return bool(own >= PROMISING * best)

    def certainty(self, available: Mask) -> Certainty | None:
        """See Strategy."""
        return self._current().certainty(available)

    def _current(self) -> Ranking:
        """The ranking with what the trials so far say of memory and cost: many are told at once when resuming."""
        if self._stale:
            self._ranking.cost = trial_cost(self._observations, self._measurement)
            if self._feasibility is not None:
                self._ranking.refit(self._feasibility.probabilities())
            self._stale = False
        return self._ranking
