"""The strategy `predicted`: it ranks rows by predicted step time, and learns time, memory and cost from every trial."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd

from tuner.core.columns import Floats
from tuner.predict.feasibility import Feasibility
from tuner.search.cost import trial_cost
from tuner.search.encoding import encode
from tuner.search.observation import Observation
from tuner.search.ranking import Ranking
from tuner.search.stopping import Certainty
from tuner.search.strategy import Mask, Strategy
from tuner.trial.contract import Measurement

PROMISING: Final = 0.5
"""A proposed row runs before the best row if its score is at least this share of the best row's score. Assumed."""


class PredictedRows(Strategy):
    """Chooses the best predicted row first, and then the row with the greatest expected improvement.

    Args:
        table: The valid layouts, one row per layout, columns as KNOBS.
        predicted_ms: The predicted step time of every row, of shape [rows].
        feasibility: Says whether rows fit the GPU's memory; None if all rows do.
        measurement: Says how many steps a trial measures; None takes the defaults.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        predicted_ms: Floats,
        feasibility: Feasibility | None = None,
        measurement: Measurement | None = None,
    ) -> None:
        self._measurement, self._feasibility = measurement or Measurement(), feasibility
        fits = None if feasibility is None else feasibility.probabilities()
        self._ranking = Ranking(encode(table), predicted_ms, fits)
        self._observations: list[Observation] = []
        self._is_stale = False

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        return self._current_ranking().choose(available, in_flight)

    def tell(self, row: int, observation: Observation) -> None:
        """See Strategy."""
        self._observations.append(observation)
        if observation.step_time_ms is not None:
            self._ranking.tell(row, observation.step_time_ms)
        elif observation.slower_than_ms is not None:
            self._ranking.tell_slower(row, observation.slower_than_ms)
        if self._feasibility is not None and (observation.out_of_memory or observation.peak_gib is not None):
            self._feasibility.tell(row, observation.peak_gib)
        self._is_stale = True

    def promises(self, row: int, available: Mask) -> bool:
        """See Strategy."""
        ranking = self._current_ranking()
        proposed, best = ranking.score(np.array([row, ranking.choose(available)]))
        return bool(proposed >= PROMISING * best)

    def certainty(self, available: Mask) -> Certainty | None:
        """See Strategy."""
        return self._current_ranking().certainty(available)

    def _current_ranking(self) -> Ranking:
        """Return the ranking, updated by what the trials say about memory and cost.

        The update waits until somebody asks: a resumed sweep tells many trials at once.
        """
        if self._is_stale:
            self._ranking.cost = trial_cost(self._observations, self._measurement)
            if self._feasibility is not None:
                self._ranking.refit(self._feasibility.probabilities())
            self._is_stale = False
        return self._ranking
