"""An Optuna sampler whose suggestions are rows of the table of valid layouts: never invalid, never twice."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from tuner.layout import KNOBS, Layout, layout_from
from tuner.search.ranking import Ranking, encode


def find_row(table: pd.DataFrame, layout: Layout) -> int | None:
    """The position of a layout in the table, or None."""
    mask = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        mask &= table[knob].to_numpy() == getattr(layout, knob)
    rows = np.flatnonzero(mask)
    return int(rows[0]) if len(rows) else None


def layout_at(table: pd.DataFrame, row: int) -> Layout:
    """The layout at a position of the table."""
    return layout_from({knob: table[knob].iloc[row] for knob in KNOBS})


def distributions(table: pd.DataFrame, tried: Sequence[Layout] = ()) -> dict[str, BaseDistribution]:
    """A categorical distribution for every knob that takes more than one value in the table and the tried layouts."""
    found: dict[str, BaseDistribution] = {}
    for knob in KNOBS:
        values = {value.item() if isinstance(value, np.generic) else value for value in table[knob].unique()}
        values |= {getattr(layout, knob) for layout in tried}
        if len(values) > 1:
            found[knob] = CategoricalDistribution(sorted(values))
    return found


class Strategy(Protocol):
    """Which row comes next."""

    def choose(self, available: NDArray[np.bool_], number: int) -> int:
        """The row of trial `number`, one of the non-empty mask `available`."""

    def tell(self, row: int, measured_ms: float) -> None:
        """Take in the measured step time of a row."""


class RandomRows:
    """Any untried row, all alike: what every other strategy must beat.

    Each trial draws by its own number, so that a resumed sweep goes on as if never stopped: Optuna stores no
    sampler's state.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, available: NDArray[np.bool_], number: int) -> int:
        """See Strategy."""
        return int(np.random.default_rng((self._seed, number)).choice(np.flatnonzero(available)))

    def tell(self, row: int, measured_ms: float) -> None:
        """Nothing is learnt."""


class PredictedRows:
    """The best predicted row first, then the greatest expected improvement on what was measured.

    Args:
        table: The valid layouts, a row each, columns as KNOBS.
        predicted_ms: The predicted step time of every row.
        fits: The probability that every row fits the GPU's memory; None where all do.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        predicted_ms: NDArray[np.float64],
        fits: NDArray[np.float64] | None = None,
    ) -> None:
        self._ranking = Ranking(encode(table), predicted_ms, fits)

    def choose(self, available: NDArray[np.bool_], number: int) -> int:
        """See Strategy."""
        return self._ranking.choose(available)

    def tell(self, row: int, measured_ms: float) -> None:
        """See Strategy."""
        self._ranking.tell(row, measured_ms)


class TableSampler(BaseSampler):
    """Suggests rows of a table as its strategy chooses them, each at most once.

    Args:
        table: The valid layouts, a row each, columns as KNOBS.
        strategy: Chooses among the rows that are left.
        tried: Layouts of earlier trials, which may lie outside a table whose sweep file has changed since.
    """

    def __init__(self, table: pd.DataFrame, strategy: Strategy, tried: Sequence[Layout] = ()) -> None:
        self._table = table
        self._strategy = strategy
        self.space = distributions(table, tried)
        self._available: NDArray[np.bool_] = np.ones(len(table), dtype=bool)

    @property
    def remaining(self) -> int:
        """Rows that may still be suggested."""
        return int(self._available.sum())

    def is_available(self, row: int) -> bool:
        """Whether a row is neither tried nor pruned."""
        return bool(self._available[row])

    def exclude(self, rows: NDArray[np.bool_]) -> int:
        """Never suggest the rows of this mask; returns how many of them were still available."""
        newly = int((self._available & rows).sum())
        self._available &= ~rows
        return newly

    def exclude_row(self, row: int) -> None:
        """Never suggest this row (again)."""
        self._available[row] = False

    def tell(self, row: int, measured_ms: float) -> None:
        """Take in the measured step time of a row."""
        self._strategy.tell(row, measured_ms)

    def choose(self, number: int) -> int:
        """The row of trial `number`.

        Raises:
            ValueError: if no row is left.
        """
        if not self.remaining:
            raise ValueError("every row is tried or pruned")
        return self._strategy.choose(self._available, number)

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

    def params(self, layout: Layout) -> dict[str, Any]:
        """A layout as Optuna's parameters: the knobs that vary."""
        return {knob: getattr(layout, knob) for knob in self.space}
