"""Whether a job with a layout would start and fit, judged from the rules and the predicted memory. Pure."""

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
"""Kinds of rules whose breach ends the job; a layout that breaks a rule of another kind starts, and may be slow."""

_CONFIG_CHECKS: Final = "transformer_config.py"
"""The file that holds Megatron-Core's checks, which Bridge runs when it resolves a recipe."""
_ARGUMENT_CHECKS: Final = "megatron/training/arguments.py"
"""The file that holds Megatron-LM's checks, which Bridge never runs."""
_ADVICE_TO_BRIDGE: Final = frozenset({"param-gather-overlap-needs-both"})
"""Rules that only Megatron-LM checks, and whose breach costs speed in Bridge."""


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
    """Judge a layout of a workload on a cluster.

    Args:
        layout: The layout.
        workload: What the job trains.
        cluster: The GPUs.
        memory_counts: Whether the predicted memory is the job's own, and no mere upper bound.
        is_resolved: Whether Bridge has resolved the layout. Then the checks of its own Megatron-Core count instead of
            our rules about them, and the rules about Megatron-LM's arguments do not apply.
        bridge_errors: What Bridge refused when it resolved the layout.
        lifted: Ids of rules that the job's Megatron-Core no longer has, or that the user lifts.
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
    """Return whether a broken rule is no reason to refuse: Bridge makes its check itself, or never makes it.

    Args:
        violation: The broken rule.
        refused: Whether Bridge refused the recipe: it stops at its first complaint, which our rule may explain.
    """
    is_argument_check = _ARGUMENT_CHECKS in violation.source and "Bridge" not in violation.source
    return is_argument_check or (_CONFIG_CHECKS in violation.source and not refused)


def _memory(layout: Layout, workload: Workload, cluster: Cluster) -> tuple[StageMemory, float]:
    """Return the stage with the highest predicted peak, and the probability that it fits."""
    stages = memory_breakdown(layout, workload, cluster, implementation_of(cluster))
    table = pd.DataFrame([asdict(layout)])
    fits = float(fit_probabilities(table, workload, cluster)[0])
    return max(stages, key=lambda stage: stage.total_gib), fits
