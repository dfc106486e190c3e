"""Judges from the rules and the predicted memory whether a job with a given layout would start and fit."""

from collections.abc import Collection
from dataclasses import asdict
from typing import Final

import pandas as pd

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.lint.nearest import nearest_layouts
from tuner.lint.pitfalls import pitfalls
from tuner.lint.verdict import LIKELY, JobVerdict
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import StageMemory, memory_breakdown
from tuner.rules.rule import Violation
from tuner.rules.validity import broken_rules

REFUSING_KINDS: Final = frozenset({"megatron", "arguments"})
"""The kinds of rules whose breach ends a user's job; a layout that breaks only other rules starts, and may be slow."""

_CONFIG_CHECKS: Final = "transformer_config.py"
"""The source file with Megatron-Core's checks, which Bridge runs when it resolves a recipe."""
_ARGUMENT_CHECKS: Final = "megatron/training/arguments.py"
"""The source file with Megatron-LM's checks, which Bridge never runs."""
_ADVICE_TO_BRIDGE: Final = frozenset({"param-gather-overlap-needs-both"})
"""Ids of rules that Megatron-LM checks and Bridge does not, and whose breach makes a job of Bridge slower."""


def judge(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    *,
    memory_counts: bool = True,
    is_resolved: bool = False,
    bridge_errors: tuple[Violation, ...] = (),
    lifted: Collection[str] = frozenset(),
) -> JobVerdict:
    """Return the verdict on a job that trains a workload with a layout on a cluster.

    Args:
        layout: The job's layout.
        workload: The workload that the job trains.
        cluster: The cluster on which the job would run.
        memory_counts: Whether the predicted memory is that of the job; False if it is only an upper bound, so that the
            job is not refused for its memory.
        is_resolved: Whether Bridge has resolved the layout. Then Bridge has run the checks of its own Megatron-Core, so
            our rules about these checks do not apply; nor do the rules about Megatron-LM's arguments.
        bridge_errors: The errors that Bridge raised when it resolved the layout.
        lifted: Ids of rules not to apply, because the user or the job's release of Megatron-Core has no such rule.
    """
    broken = broken_rules(layout, workload, cluster, lifted)
    inapplicable = {
        item.rule for item in broken if is_resolved and is_left_to_bridge(item, refused=bool(bridge_errors))
    }
    own_errors = tuple(
        item for item in broken if item.kind in REFUSING_KINDS and item.rule not in inapplicable
    )
    refused = (*own_errors, *bridge_errors)
    advice = [
        item for item in broken if item.kind == "policy" or item.rule in inapplicable & _ADVICE_TO_BRIDGE
    ]
    warnings = [f"{item.rule}: {item.message}" for item in advice]
    if not refused:
        warnings += pitfalls(layout, workload, cluster)
    worst, fits = (None, None) if own_errors else _memory(layout, workload, cluster)
    needs_neighbours = fits is None or (memory_counts and fits < LIKELY)
    return JobVerdict(
        layout=layout,
        refused=refused,
        warnings=tuple(warnings),
        worst=worst,
        fits=fits,
        nearest=nearest_layouts(layout, workload, cluster, lifted) if needs_neighbours else (),
        memory_counts=memory_counts,
    )


def is_left_to_bridge(violation: Violation, *, refused: bool) -> bool:
    """Return whether a broken rule is no reason to refuse a recipe: Bridge runs the rule's check itself, or never.

    Args:
        violation: The broken rule.
        refused: Whether Bridge refused the recipe. Bridge stops at its first error, so then it may not have run the
            check of this rule.
    """
    is_argument_check = _ARGUMENT_CHECKS in violation.source and "Bridge" not in violation.source
    return is_argument_check or (_CONFIG_CHECKS in violation.source and not refused)


def _memory(layout: Layout, workload: Workload, cluster: Cluster) -> tuple[StageMemory, float]:
    """Return the pipeline stage with the highest predicted peak memory, and the probability that the layout fits."""
    stages = memory_breakdown(layout, workload, cluster, implementation_of(cluster))
    table = pd.DataFrame([asdict(layout)])
    fits = float(fit_probabilities(table, workload, cluster)[0])
    return max(stages, key=lambda stage: stage.total_gib), fits
