"""The layouts one step from the best, and what each costs: measured, predicted, or impossible and why."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from tuner.core.choices import CHOICES, codes_of, one_step, value_of
from tuner.core.layout import Layout
from tuner.explain.evidence import Evidence
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.feasibility import MIN_FIT
from tuner.rules.validity import broken_rules
from tuner.space.table import find_row, layout_at
from tuner.trial.contract import Outcome
from tuner.trial.finished import SEARCHED, FinishedTrial, completed


class NeighbourStatus(StrEnum):
    """What is known of a neighbour."""

    MEASURED = "measured"
    SLOWER = "slower"
    """Ended before it was measured to the end: its cost is a lower bound."""
    PREDICTED = "predicted"
    """Not tried: what the trials make of its predicted step time."""
    FAILED = "failed"
    RULED_OUT = "ruled out"
    """Needs as much memory as a layout that ran out of it."""
    TOO_LARGE = "too large"
    """Predicted to need more memory than there is."""
    INVALID = "invalid"
    OUTSIDE = "not searched"
    """Valid, but none of the sweep's layouts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A layout that differs from the best in one choice, and in what that forces."""

    choice: str
    value: str
    """What it takes for the choice."""
    forced: tuple[str, ...]
    """The choices that had to follow."""
    layout: Layout
    known: NeighbourStatus
    cost: float | None
    """Its step time, or what that is above, over the best's, less 1; None where it cannot run."""
    why: str
    """The trial that measured it or how that ended, or what is in its way."""


def neighbours(evidence: Evidence, best: FinishedTrial) -> tuple[Neighbour, ...]:
    """The neighbours of a completed trial's layout: the fastest first, then those that cannot run."""
    assert best.result.metrics is not None, "only a completed trial is the best"
    # Its neighbours were measured in the search: beside them stands what it measured there, not its finals.
    searched = [
        trial for trial in evidence.trials if trial.layout == best.layout and trial.source in SEARCHED
    ]
    metrics = [own for _, own in completed(searched)] or [best.result.metrics]
    near = [*_valid(evidence, best.layout, metrics[0].step_time_ms)]
    near += _others(evidence, best.layout, {(one.choice, one.value) for one in near})
    return tuple(sorted(near, key=lambda one: (one.cost is None, one.cost or 0.0)))


def _valid(evidence: Evidence, layout: Layout, best_ms: float) -> Iterator[Neighbour]:
    """The neighbours among the rows of the table."""
    names, order = list(CHOICES), list(NeighbourStatus)
    start = find_row(evidence.table, layout)
    assert start is not None, "every trial has its row"
    for number, rows in one_step(codes_of(evidence.table), start):
        judged = [(*_judged(evidence, int(row)), layout_at(evidence.table, int(row))) for row in rows]
        # Where several could follow alike, what was measured says most, then what is expected to be fastest.
        known, step_ms, why, other = min(judged, key=lambda one: (order.index(one[0]), one[1] or 0.0))
        choice = names[number]
        yield Neighbour(
            choice=choice,
            value=value_of(choice, other),
            forced=tuple(n for n in names if n != choice and value_of(n, other) != value_of(n, layout)),
            layout=other,
            known=known,
            cost=None if step_ms is None else step_ms / best_ms - 1,
            why=why,
        )


def _judged(evidence: Evidence, row: int) -> tuple[NeighbourStatus, float | None, str]:
    """What is known of a row, its step time in ms where it has one, and the reason."""
    trials = [evidence.trials[each] for each in np.flatnonzero(evidence.rows == row)]
    for trial, metrics in completed(trials):
        return NeighbourStatus.MEASURED, metrics.step_time_ms, f"trial {trial.number}"
    for trial in trials:
        if (bound_ms := trial.result.slower_than_ms) is not None:
            return NeighbourStatus.SLOWER, bound_ms, f"trial {trial.number}: at least, {trial.result.outcome}"
        return NeighbourStatus.FAILED, None, f"trial {trial.number}: {trial.result.outcome}"
    one, sweep = evidence.table.iloc[[row]], evidence.sweep
    for trial in evidence.trials:
        if trial.result.outcome is Outcome.OOM and needs_at_least_as_much_memory(
            one, trial.layout, sweep.workload, sweep.cluster
        ):
            return NeighbourStatus.RULED_OUT, None, f"needs as much memory as trial {trial.number}"
    fits = f"peak {evidence.predicted_gib[row]:.3g} GiB, P(fit) {evidence.fit[row]:.0%}"
    if evidence.predicted_fit[row] < MIN_FIT:
        return NeighbourStatus.TOO_LARGE, None, fits
    return NeighbourStatus.PREDICTED, float(evidence.expected_ms[row]), fits


def _others(evidence: Evidence, layout: Layout, reached: Collection[tuple[str, str]]) -> Iterator[Neighbour]:
    """The values that the sweep searches and no neighbour takes: what is in their way."""
    sweep = evidence.sweep
    for choice, knobs in CHOICES.items():
        values = sweep.domain.get(choice, ()) if len(knobs) == 1 else ()
        for value in values:
            changed: dict[str, Any] = {choice: value}
            other = replace(layout, **changed)
            if other == layout or (choice, value_of(choice, other)) in reached:
                continue
            broken = broken_rules(other, sweep.workload, sweep.cluster, sweep.lifted)
            yield Neighbour(
                choice=choice,
                value=value_of(choice, other),
                forced=(),
                layout=other,
                known=NeighbourStatus.INVALID if broken else NeighbourStatus.OUTSIDE,
                cost=None,
                why=", ".join(item.rule for item in broken),
            )
