"""Which row of the table comes next: what a strategy is told, what it answers, and the two that learn nothing."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState

from tuner.search.stopping import Certainty
from tuner.sweep.study import STATES
from tuner.trial.contract import Outcome, TrialResult

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What an ended trial says about its row."""

    state: TrialState
    """COMPLETE, PRUNED or FAIL, as Optuna counts it."""
    step_time_ms: float | None = None
    """Measured; present exactly if the trial completed."""
    slower_than_ms: float | None = None
    """A lower bound of the step time, where the trial ended before it measured one."""
    peak_gib: float | None = None
    """Allocated, of the worst rank, of a trial that did its steps: completed, or given up as too slow."""
    out_of_memory: bool = False
    fixed_s: float = 0.0
    """What the trial took beside its steps: start-up, build, the end."""
    steps: int = 0
    """Optimizer steps of a completed trial, warm-up included."""

    @classmethod
    def of(cls, result: TrialResult) -> Self:
        """What the result of a trial that is not to be run again says."""
        metrics, durations = result.metrics, result.durations
        return cls(
            state=STATES[result.outcome],
            step_time_ms=metrics.step_time_ms if metrics else None,
            slower_than_ms=result.slower_than_ms,
            peak_gib=_peak_gib(result),
            out_of_memory=result.outcome is Outcome.OOM,
            fixed_s=durations.total_s - durations.warmup_s - durations.measure_s,
            steps=len(metrics.losses) if metrics else 0,
        )


def _peak_gib(result: TrialResult) -> float | None:
    if result.metrics is not None:
        return result.metrics.peak_allocated_gib
    if result.outcome is not Outcome.TOO_SLOW:
        return None
    peaks = [record.peak_allocated_gib for record in result.ranks if record.peak_allocated_gib is not None]
    return max(peaks, default=None)


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
