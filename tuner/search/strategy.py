"""Which row of the table comes next: what a strategy is told, what it answers, and the two that learn nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.search.observation import Observation
from tuner.search.stopping import Certainty

Mask = NDArray[np.bool_]


class Strategy(ABC):
    """Chooses among the rows that are left, and learns from those that ended."""

    @abstractmethod
    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """The row of trial `number`, one of the non-empty mask `available`, while other rows are being measured."""

    def tell(self, row: int, observation: Observation) -> None:
        """Take in how the trial of a row ended."""
        return None

    def promises(self, row: int, available: Mask) -> bool:
        """Whether a row that someone proposes is worth a trial, beside what this strategy would choose."""
        return True

    def certainty(self, available: Mask) -> Certainty | None:
        """How near the best measured row is to the best of all; None where nothing is modelled or measured."""
        return None


class RandomRows(Strategy):
    """Any untried row, all alike: what every other strategy must beat.

    Each trial draws by its own number, so that a resumed sweep goes on as if never stopped: Optuna stores no
    sampler's state.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        return int(np.random.default_rng((self._seed, number)).choice(np.flatnonzero(available)))


class GridRows(Strategy):
    """The table's rows in its order."""

    def choose(self, available: Mask, number: int, in_flight: Sequence[int] = ()) -> int:
        """See Strategy."""
        return int(available.argmax())
