"""What is valid: one object a rule, asked of one layout (`broken_rules`) or of a whole table (`valid_mask`).

The only place that knows. Truth is the installed Megatron; tests/integration holds the rules against it.
"""

from collections.abc import Collection

import numpy as np
import pandas as pd

from tuner.cluster import Cluster
from tuner.errors import InputError, did_you_mean
from tuner.layout import Layout
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
from tuner.rules.base import Bools, Columns, Kind, Rule, Texts, Violation
from tuner.workload import Workload

__all__ = [
    "RULES",
    "Columns",
    "Kind",
    "Rule",
    "Texts",
    "Violation",
    "active_rules",
    "broken_rules",
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
    """The rules without those the user lifts.

    Raises:
        InputError: if a lifted rule is unknown, or is no policy: nobody can lift what Megatron refuses.
    """
    policies = {rule.id for rule in RULES if rule.kind == "policy"}
    for name in sorted(set(lifted) - policies):
        hint = did_you_mean(name, policies)
        known = f"; policies that can be lifted: {', '.join(sorted(policies))}"
        what = "is no policy" if name in {rule.id for rule in RULES} else "is no rule"
        raise InputError(f"lift: '{name}' {what}{hint}{known}")
    return tuple(rule for rule in RULES if rule.id not in lifted)


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
