"""The interface of a strategy, which chooses the next row of the table, and the two strategies that learn nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from tuner.core.columns import Bools
from tuner.search.observation import Observation
from tuner.search.stopping import Certainty

Mask = Bools
"""A selection of rows of a table: whether each row is in it, of shape [rows]."""


class Strategy(ABC):
    """Chooses among the rows that are left, and learns from those whose trials ended."""

    @abstractmethod
    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """Return the row that trial `number` measures.

        Args:
            available: The rows to choose from; never empty.
            number: The number of the trial.
            in_flight: Rows whose trials have not ended yet.
        """

    def tell(self, row: int, observation: Observation) -> None:
        """Learn how the trial of a row ended."""
        return None

    def promises(self, row: int, available: Mask) -> bool:
        """Return whether a row that somebody proposes is worth a trial, compared with this strategy's own choice."""
        return True

    def certainty(self, available: Mask) -> Certainty | None:
        """Return how near the best measured row is to the best of all; None if nothing is modelled or measured."""
        return None


class RandomRows(Strategy):
    """Draws every row with equal probability: what every other strategy must beat.

    Each trial draws with a random seed of its own, made from the sweep's random seed and the trial's number, because
    Optuna stores no sampler state. A resumed sweep therefore draws what it would have drawn without the interruption.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        return int(np.random.default_rng((self._seed, number)).choice(np.flatnonzero(available)))


class GridRows(Strategy):
    """Takes the rows in the order of the table."""

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        return int(available.argmax())
