"""The layouts that differ from the best in one choice: what each costs, measured or predicted, or why it cannot run."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from tuner.core.choices import CHOICES, codes_of, one_step, value_of
from tuner.core.columns import Columns
from tuner.core.layout import Layout
from tuner.explain.evidence import Evidence
from tuner.predict.dominance import dominating
from tuner.predict.feasibility import MIN_FIT
from tuner.rules.validity import broken_rules
from tuner.space.table import find_row, layout_at
from tuner.trial.finished import SEARCHED, FinishedTrial, completed


class NeighbourStatus(StrEnum):
    """How a neighbour's cost is known, or why it has none; the members that say most about the cost come first."""

    MEASURED = "measured"
    SLOWER = "slower"
    """The neighbour's trial ended before it measured a step time, so the cost is a lower bound."""
    PREDICTED = "predicted"
    """The neighbour was not tried; its cost is the predicted one, corrected by the trials."""
    FAILED = "failed"
    RULED_OUT = "ruled out"
    """The neighbour needs at least as much memory as a layout that ran out of memory."""
    TOO_LARGE = "too large"
    """The neighbour is predicted to need more memory than the GPU has."""
    INVALID = "invalid"
    OUTSIDE = "not searched"
    """The neighbour is valid, but not one of the sweep's layouts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A layout that differs from the best one in one choice, and otherwise only in choices that this choice forces."""

    choice: str
    value: str
    """The neighbour's value of the choice."""
    forced: tuple[str, ...]
    """The other choices that differ, because this choice forces them to change."""
    layout: Layout
    known: NeighbourStatus
    cost: float | None
    """The neighbour's step time, or its lower bound, divided by the best layout's, minus 1; None if it cannot run."""
    why: str
    """The trial that measured the neighbour and how it ended, or the reason why the neighbour cannot run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowStatus:
    """What is known about one row of the table."""

    status: NeighbourStatus
    step_ms: float | None
    """The row's step time, or its lower bound; None if the row cannot run."""
    why: str

    @property
    def sort_key(self) -> tuple[int, float]:
        """The key by which rows sort: those whose status says more come first, and among equals the faster ones."""
        return list(NeighbourStatus).index(self.status), self.step_ms or 0.0


def neighbours(evidence: Evidence, best: FinishedTrial) -> tuple[Neighbour, ...]:
    """Return the neighbours of a completed trial's layout: the fastest first, then those that cannot run."""
    assert best.result.metrics is not None, "only a completed trial is the best"
    # The search measured the neighbours, so they are compared with the search's measurement of the best layout, not
    # with finals.
    searched = [
        trial for trial in evidence.trials if trial.layout == best.layout and trial.source in SEARCHED
    ]
    best_metrics = [metrics for _, metrics in completed(searched)] or [best.result.metrics]
    valid = list(_valid_neighbours(evidence, best.layout, best_metrics[0].step_time_ms))
    reached = {(neighbour.choice, neighbour.value) for neighbour in valid}
    found = [*valid, *_unreached_values(evidence, best.layout, reached)]
    return tuple(sorted(found, key=lambda neighbour: (neighbour.cost is None, neighbour.cost or 0.0)))


def _valid_neighbours(evidence: Evidence, layout: Layout, best_ms: float) -> Iterator[Neighbour]:
    """Yield the neighbours among the rows of the table."""
    choices, start = list(CHOICES), find_row(evidence.table, layout)
    assert start is not None, "every trial has its row"
    steps = list(one_step(codes_of(evidence.table), start))
    statuses = _row_statuses(evidence, sorted({int(row) for _, rows in steps for row in rows}))
    for number, rows in steps:
        # Several rows may take this value, with different values of the choices that it forces.
        row = min(rows.tolist(), key=lambda row: statuses[row].sort_key)
        choice, known, other = choices[number], statuses[row], layout_at(evidence.table, row)
        differing = [name for name in choices if value_of(name, other) != value_of(name, layout)]
        yield Neighbour(
            choice=choice,
            value=value_of(choice, other),
            forced=tuple(name for name in differing if name != choice),
            layout=other,
            known=known.status,
            cost=None if known.step_ms is None else known.step_ms / best_ms - 1,
            why=known.why,
        )


def _row_statuses(evidence: Evidence, rows: Sequence[int]) -> dict[int, _RowStatus]:
    """Return what is known about each of these rows."""
    trials: dict[int, list[FinishedTrial]] = {}
    for row, trial in zip(evidence.rows.tolist(), evidence.trials, strict=True):
        trials.setdefault(row, []).append(trial)
    untried = [row for row in rows if row not in trials]
    dominated_by = dict(zip(untried, _dominated_by(evidence, untried), strict=True))
    return {
        row: _tried_status(trials[row])
        if row in trials
        else _untried_status(evidence, row, dominated_by[row])
        for row in rows
    }


def _dominated_by(evidence: Evidence, rows: Sequence[int]) -> list[int | None]:
    """Return for each row the first trial out of memory that it needs as much memory as; None if there is none."""
    workload, cluster = evidence.sweep.workload, evidence.sweep.cluster
    columns, first = Columns.of(evidence.table.iloc[[*rows]]), np.full(len(rows), -1)
    for trial in evidence.trials:
        if trial.result.is_too_large:
            mask = dominating(columns, trial.layout, workload, cluster)
            first = np.where((first < 0) & mask, trial.number, first)
    return [number if number >= 0 else None for number in first.tolist()]


def _tried_status(trials: list[FinishedTrial]) -> _RowStatus:
    """Return what the trials of one row say: the fastest measurement, or how the first trial ended."""
    for trial, metrics in completed(trials):
        return _RowStatus(
            status=NeighbourStatus.MEASURED, step_ms=metrics.step_time_ms, why=f"trial {trial.number}"
        )
    first = trials[0]
    outcome, bound_ms = first.result.outcome, first.result.slower_than_ms
    if bound_ms is not None:
        why = f"trial {first.number}: at least, {outcome}"
        return _RowStatus(status=NeighbourStatus.SLOWER, step_ms=bound_ms, why=why)
    return _RowStatus(status=NeighbourStatus.FAILED, step_ms=None, why=f"trial {first.number}: {outcome}")


def _untried_status(evidence: Evidence, row: int, dominated_by: int | None) -> _RowStatus:
    """Return what the trials of other rows, and the predictions, say about a row without a trial."""
    if dominated_by is not None:
        why = f"needs as much memory as trial {dominated_by}"
        return _RowStatus(status=NeighbourStatus.RULED_OUT, step_ms=None, why=why)
    fit = f"peak {evidence.predicted_gib[row]:.3g} GiB, P(fit) {evidence.fit[row]:.0%}"
    if evidence.predicted_fit[row] < MIN_FIT:
        return _RowStatus(status=NeighbourStatus.TOO_LARGE, step_ms=None, why=fit)
    return _RowStatus(status=NeighbourStatus.PREDICTED, step_ms=float(evidence.expected_ms[row]), why=fit)


def _unreached_values(
    evidence: Evidence, layout: Layout, reached: Collection[tuple[str, str]]
) -> Iterator[Neighbour]:
    """Yield the values that the sweep searches and that no neighbour takes, with the rules that they break."""
    sweep = evidence.sweep
    for choice, knobs in CHOICES.items():
        values = sweep.domain.get(choice, ()) if len(knobs) == 1 else ()
        for value in values:
            changed: dict[str, Any] = {choice: value}
            other = replace(layout, **changed)
            if other == layout or (choice, value_of(choice, other)) in reached:
                continue
            violations = broken_rules(other, sweep.workload, sweep.cluster, sweep.lifted)
            yield Neighbour(
                choice=choice,
                value=value_of(choice, other),
                forced=(),
                layout=other,
                known=NeighbourStatus.INVALID if violations else NeighbourStatus.OUTSIDE,
                cost=None,
                why=", ".join(violation.rule for violation in violations),
            )
