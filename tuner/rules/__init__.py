"""What is valid: one object a rule, asked of one layout (`broken_rules`) or of a whole table (`valid_mask`).

The only place that knows. Truth is the installed Megatron; tests/integration holds the rules against it.
"""

from collections.abc import Collection

import numpy as np
import pandas as pd

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Texts
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import InputError, did_you_mean
from tuner.rules import (
    batch,
    context,
    environment,
    graphs,
    grids,
    memory,
    moe,
    overlap,
    pipeline,
    placement,
    recompute,
    shapes,
)
from tuner.rules.base import Kind, Rule, Violation

__all__ = [
    "RULES",
    "Columns",
    "Kind",
    "Rule",
    "Texts",
    "Violation",
    "active_rules",
    "broken_rules",
    "gone_rules",
    "valid_mask",
]

RULES: tuple[Rule, ...] = (
    *grids.RULES,
    *shapes.RULES,
    *context.RULES,
    *moe.RULES,
    *placement.RULES,
    *pipeline.RULES,
    *batch.RULES,
    *recompute.RULES,
    *overlap.RULES,
    *memory.RULES,
    *graphs.RULES,
    *environment.RULES,
)
"""Every rule. Where a layout breaks several, the first of them is the one that counts."""


def active_rules(lifted: Collection[str] = frozenset()) -> tuple[Rule, ...]:
    """The rules without those that are lifted: by the user, or by a newer Megatron-Core.

    Raises:
        InputError: if a lifted rule is unknown, or is neither a policy nor gone in some release: nobody can lift what
            Megatron refuses.
    """
    liftable = {rule.id for rule in RULES if rule.kind == "policy" or rule.gone_in}
    for name in sorted(set(lifted) - liftable):
        hint = did_you_mean(name, liftable)
        known = f"; what can be lifted: {', '.join(sorted(liftable))}"
        what = "is no policy" if name in {rule.id for rule in RULES} else "is no rule"
        raise InputError(f"lift: '{name}' {what}{hint}{known}")
    return tuple(rule for rule in RULES if rule.id not in lifted)


def gone_rules(megatron_core: str) -> frozenset[str]:
    """The rules that a release of Megatron-Core, `0.19.2`, no longer asks; an unknown one, empty, counts as new."""
    release = _release(megatron_core)
    return frozenset(
        rule.id for rule in RULES if rule.gone_in and (not release or _release(rule.gone_in) <= release)
    )


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def broken_rules(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str] = frozenset()
) -> tuple[Violation, ...]:
    """Every rule that `layout` breaks, in the order of RULES; empty for a valid layout."""
    columns = Columns.single(layout)
    return tuple(
        Violation(
            rule=rule.id, kind=rule.kind, message=rule.message(layout, workload, cluster), source=rule.source
        )
        for rule in active_rules(lifted)
        if not rule.mask(columns, workload, cluster, 1)[0]
    )


def valid_mask(
    table: pd.DataFrame, workload: Workload, cluster: Cluster, lifted: Collection[str] = frozenset()
) -> Bools:
    """Which rows of a table with every knob as a column are valid: an array of bools, one a row."""
    columns = Columns.of(table)
    mask = np.ones(len(table), dtype=np.bool_)
    for rule in active_rules(lifted):
        mask &= rule.mask(columns, workload, cluster, len(table))
    return mask
