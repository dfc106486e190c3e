"""Judge layouts by every rule: one layout (`broken_rules`) or a whole table of them (`valid_mask`).

No other module decides what is valid. The installed Megatron is the truth, and tests/integration holds the rules
against it.
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
    """Return every rule but the lifted ones: the user lifts them, or a newer Megatron-Core no longer asks them.

    Raises:
        InputError: if a lifted rule is unknown, or can't be lifted: only a policy can, and a rule that some release of
            Megatron-Core no longer asks.
    """
    liftable = {rule.id for rule in RULES if rule.kind == "policy" or rule.gone_in}
    for name in sorted(set(lifted) - liftable):
        hint = did_you_mean(name, liftable)
        choices = f"; what can be lifted: {', '.join(sorted(liftable))}"
        problem = "is no policy" if name in {rule.id for rule in RULES} else "is no rule"
        raise InputError(f"lift: '{name}' {problem}{hint}{choices}")
    return tuple(rule for rule in RULES if rule.id not in lifted)


def gone_rules(megatron_core: str) -> frozenset[str]:
    """Return the ids of the rules that a release of Megatron-Core no longer asks.

    `megatron_core` is a version such as `0.19.2`; an empty text, for an unknown version, counts as the newest.
    """
    release = _release(megatron_core)
    return frozenset(
        rule.id for rule in RULES if rule.gone_in and (not release or _release(rule.gone_in) <= release)
    )


def _release(version: str) -> tuple[int, ...]:
    """Return the major and the minor number of a version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def broken_rules(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str] = frozenset()
) -> tuple[Violation, ...]:
    """Return a violation for every rule that `layout` breaks, in the order of RULES; empty for a valid layout."""
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
    """Return which rows of a table are valid, one bool per row. The table holds every knob as a column."""
    columns = Columns.of(table)
    mask = np.ones(len(table), dtype=np.bool_)
    for rule in active_rules(lifted):
        mask &= rule.mask(columns, workload, cluster, len(table))
    return mask
