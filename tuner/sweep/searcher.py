"""What the search has learnt: which rows are left, which of them promises most, and how certain the best is."""

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import pandas as pd

from tuner.analysis.drift import Drift, drift
from tuner.analysis.runs import counting_trials
from tuner.core.columns import Columns
from tuner.core.layout import Layout
from tuner.predict.calibration import Calibration
from tuner.predict.dominance import dominating
from tuner.predict.feasibility import MIN_FIT
from tuner.search.observation import Observation
from tuner.search.problem import Problem
from tuner.search.refinement import centre_layouts, with_refinements
from tuner.search.stopping import Certainty
from tuner.search.strategies import strategy_of
from tuner.search.strategy import Mask, Strategy
from tuner.space.table import RowIndex, layout_at
from tuner.sweep.state import SweepState
from tuner.trial.finished import SEARCHED, FinishedTrial

_SEARCHED_SPACE: Final = {
    "whole": "the space",
    "grid": "the grid",
    "refinement": "the grid and its refinement",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Search:
    """Makes searchers from the grid and the predictions of its rows."""

    problem: Problem
    grid: pd.DataFrame
    """Valid layouts that may fit, one row per layout, columns as KNOBS; the baseline's row is among them."""
    calibration: Calibration | None = None
    """The machine's calibration, for predicted step times."""

    def searcher(self, state: SweepState) -> "Searcher":
        """A searcher that has learnt from every trial of a state, as if it had watched them end one by one."""
        layouts = list(state.layouts().values())
        table = with_refinements(self.grid, centre_layouts(state.centres, layouts), self.problem, MIN_FIT)
        part = ("refinement" if state.centres else "grid") if self.problem.refined else "whole"
        searcher = Searcher(
            problem=self.problem,
            table=table,
            strategy=strategy_of(self.problem, table, self.calibration),
            searched=_SEARCHED_SPACE[part],
        )
        searcher.learn_all(state)
        return searcher

    def after(
        self, searcher: "Searcher", before: SweepState, after: SweepState, trial: FinishedTrial
    ) -> "Searcher":
        """Return a searcher that has also learnt from `trial`, which has just ended.

        If that changes an earlier measurement, by a repeat or by another estimate of the drift, the result is a new
        searcher that has learnt from all trials.
        """
        if trial.source == "repeat" or drift(after.ended) != drift(before.ended):
            return self.searcher(after)
        searcher.learn(trial, trial, drift(after.ended))
        return searcher


@dataclass(kw_only=True, slots=True, eq=False)
class Searcher:
    """The rows of a table, the strategy that orders them, and what the trials have taught the strategy.

    A row is in flight from when a trial takes it until that trial's measurement is learnt; each row is suggested at
    most once.
    """

    problem: Problem
    table: pd.DataFrame
    strategy: Strategy
    searched: str
    """The set that the rows make up, as in `Certainty.searched`."""
    pruned: int = 0
    """Rows ruled out without a run, by memory dominance."""
    _rows: RowIndex = field(init=False)
    _columns: Columns = field(init=False)
    _available: Mask = field(init=False)
    _in_flight: dict[int, int] = field(default_factory=dict, init=False)
    """The row of each trial in flight, by the trial's number."""
    _certainty: Certainty | None = field(default=None, init=False)
    _is_certainty_current: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._rows, self._columns = RowIndex(self.table), Columns.of(self.table)
        self._available = np.ones(len(self.table), dtype=np.bool_)

    @property
    def remaining(self) -> int:
        """Rows that may still be suggested."""
        return int(self._available.sum())

    def is_available(self, layout: Layout) -> bool:
        """Whether a layout is a row of the table that is neither tried nor ruled out."""
        row = self._rows.find(layout)
        return row is not None and bool(self._available[row])

    def promises(self, layout: Layout) -> bool:
        """Whether a layout is an available row, and worth a trial compared with the strategy's own choice."""
        row = self._rows.find(layout)
        return row is not None and bool(self._available[row]) and self.strategy.promises(row, self._available)

    def suggest(self, number: int) -> Layout:
        """The layout that trial `number` should measure, given the rows in flight; its row is not taken yet.

        Raises:
            ValueError: if no row is left.
        """
        if not self.remaining:
            raise ValueError("every row is tried or ruled out")
        row = self.strategy.choose(self._available, number, tuple(self._in_flight.values()))
        return layout_at(self.table, row)

    def take(self, number: int, layout: Layout, source: str) -> None:
        """Note that a trial measures a layout; a trial whose source is not of the search takes no row."""
        row = self._rows.find(layout)
        if row is not None and source in SEARCHED:
            self._available[row] = False
            self._in_flight[number] = row

    def learn(self, first: FinishedTrial, counted: FinishedTrial, drifted: Drift | None) -> None:
        """Learn what a trial of the search measured; a trial that is not of the search teaches nothing.

        Args:
            first: The trial that took the row.
            counted: The trial whose measurement counts for the row: `first`, or its repeat.
            drifted: The machine's drift, which is taken out of the measured step time.
        """
        if first.source not in SEARCHED:
            return
        self._is_certainty_current = False
        if counted.result.is_too_large:
            workload, cluster = self.problem.workload, self.problem.cluster
            self._rule_out(dominating(self._columns, counted.layout, workload, cluster))
        row = self._in_flight.pop(first.number, None)
        if row is not None:
            self.strategy.tell(row, _without_drift(counted, drifted))

    def learn_all(self, state: SweepState) -> None:
        """Learn from every ended trial of a state, and note the rows of those that wait or run."""
        by_number = {trial.number: trial for trial in state.ended}
        drifted = drift(state.ended)
        for number, counted in counting_trials(state.ended).items():
            first = by_number[number]
            self.take(number, counted.layout, first.source)
            self.learn(first, counted, drifted)
        for waiting in state.waiting:
            self.take(waiting.number, waiting.layout, waiting.source.source)
        for running in state.running:
            self.take(running.number, running.layout, running.source.source)

    def certainty(self) -> Certainty | None:
        """How near the best measured row is to the best of all; None if nothing is modelled, measured or left."""
        if not self._is_certainty_current:
            left = self._available.copy()
            left[list(self._in_flight.values())] = True
            certainty = self.strategy.certainty(left) if left.any() else None
            self._certainty = certainty and replace(certainty, searched=self.searched)
            self._is_certainty_current = True
        return self._certainty

    def _rule_out(self, rows: Mask) -> None:
        self.pruned += int((self._available & rows).sum())
        self._available &= ~rows


def _without_drift(trial: FinishedTrial, drifted: Drift | None) -> Observation:
    """What a trial says about its row, corrected to the machine's speed at the start of the sweep."""
    observation = Observation.of(trial.result)
    factor = drifted.factor(trial) if drifted else 1.0
    if factor == 1.0:
        return observation
    return replace(
        observation,
        step_time_ms=None if observation.step_time_ms is None else observation.step_time_ms / factor,
        slower_than_ms=None if observation.slower_than_ms is None else observation.slower_than_ms / factor,
    )
