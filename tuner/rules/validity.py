"""Judge layouts by every rule: one layout (`broken_rules`) or a whole table of them (`valid_mask`).

No other module decides what is valid. The installed Megatron has the last word: tests/integration compares the rules
with it.
"""

from collections.abc import Collection

import numpy as np
import pandas as pd

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
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
from tuner.rules.rule import Rule, Violation

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
"""Every rule, in the order in which `broken_rules` lists them."""


def active_rules(lifted: Collection[str] = frozenset()) -> tuple[Rule, ...]:
    """Return every rule except those whose ids are in `lifted`, which are switched off.

    The user switches rules off, and some rules do not hold in every release of Megatron-Core (see
    `tuner.rules.releases`).

    Raises:
        InputError: if an id is unknown, or its rule can't be switched off: only a policy can, or a rule that does not
            hold in every supported release of Megatron-Core.
    """
    liftable = {rule.id for rule in RULES if rule.kind == "policy" or rule.since or rule.gone_in}
    for name in sorted(set(lifted) - liftable):
        hint = did_you_mean(name, liftable)
        choices = f"; what can be lifted: {', '.join(sorted(liftable))}"
        problem = "is no policy" if name in {rule.id for rule in RULES} else "is no rule"
        raise InputError(f"lift: '{name}' {problem}{hint}{choices}")
    return tuple(rule for rule in RULES if rule.id not in lifted)


def broken_rules(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str] = frozenset()
) -> tuple[Violation, ...]:
    """Return a violation for every rule that `layout` breaks, in the order of RULES; empty for a valid layout.

    The rules whose ids are in `lifted` are not checked.
    """
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
    """Return one bool per row of a table: whether the row is valid. The table has every knob as a column.

    The rules whose ids are in `lifted` are not checked.
    """
    columns = Columns.of(table)
    mask = np.ones(len(table), dtype=np.bool_)
    for rule in active_rules(lifted):
        mask &= rule.mask(columns, workload, cluster, len(table))
    return mask
