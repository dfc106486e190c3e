"""Judges whether a recipe of Megatron Bridge would start and fit, from what Bridge says when it resolves the recipe."""

from collections.abc import Collection
from typing import Final

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.errors import InputError
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, missing_on_this_machine
from tuner.frameworks.megatron_bridge.limits import (
    fixed_settings,
    memory_is_overstated,
    unmodelled_encoders,
    unstated_architecture,
)
from tuner.frameworks.megatron_bridge.recipe_layout import layout_of
from tuner.frameworks.megatron_bridge.recipe_workload import workload_of
from tuner.lint.judge import REFUSING_KINDS, is_left_to_bridge, judge
from tuner.lint.verdict import RecipeVerdict
from tuner.rules.releases import rules_of_other_releases
from tuner.rules.rule import Violation
from tuner.rules.validity import broken_rules

_RULES_OF_GRIDS: Final = frozenset({"dense-grid", "expert-grid", "batch-by-micro-batch"})
"""Ids of the rules that read only the degrees of parallelism and the batch sizes, so that they apply to any model."""


def judge_recipe(facts: RecipeFacts, cluster: Cluster, memory_is_known: bool = True) -> RecipeVerdict:
    """Return the verdict on a recipe, on the cluster for which Bridge has resolved it.

    Args:
        facts: What Bridge says of the recipe.
        cluster: A cluster with as many GPUs as the recipe was resolved for.
        memory_is_known: Whether the memory of the cluster's GPUs is known; if not, no recipe is refused for its memory.
    """
    missing = missing_on_this_machine(facts)
    if not facts.built:
        reason = missing or f"Bridge cannot build it here: {facts.error}"
        return RecipeVerdict(facts=facts, unjudged=reason)
    errors = () if missing else _errors_of_bridge(facts)
    encoders = unmodelled_encoders(facts)
    notes = (*fixed_settings(facts), *([encoders] if encoders else []))
    unjudged = unstated_architecture(facts)
    try:
        layout = layout_of(facts.values, cluster)
        if unjudged is None:
            verdict = judge(
                layout,
                workload_of(facts.values, facts.name),
                cluster,
                memory_counts=memory_is_known and not memory_is_overstated(facts),
                is_resolved=True,
                bridge_errors=errors,
                lifted=rules_of_other_releases(facts.megatron_core),
            )
            return RecipeVerdict(facts=facts, verdict=verdict, notes=notes)
        errors = (*_broken_grids(layout, facts, cluster), *errors)
    except InputError as error:
        unjudged = unjudged or str(error)
    return RecipeVerdict(facts=facts, refused=errors, unjudged=unjudged, notes=notes)


def refused_beside_bridge(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str]
) -> tuple[Violation, ...]:
    """Return the broken rules that would end the job of a recipe although Bridge resolves the recipe without an error.

    They are rules about checks that Bridge does not run when it resolves a recipe, and rules of the kind `program`.

    Args:
        layout: The recipe's layout.
        workload: The workload that the recipe trains.
        cluster: The cluster for which Bridge has resolved the recipe.
        lifted: Ids of rules not to apply.
    """
    return tuple(
        item
        for item in broken_rules(layout, workload, cluster, lifted)
        if item.kind == "program"
        or (item.kind in REFUSING_KINDS and not is_left_to_bridge(item, refused=False))
    )


def _errors_of_bridge(facts: RecipeFacts) -> tuple[Violation, ...]:
    if not facts.error:
        return ()
    return (Violation(rule="megatron-bridge", kind="arguments", message=facts.error, source=facts.frame),)


def _broken_grids(layout: Layout, facts: RecipeFacts, cluster: Cluster) -> tuple[Violation, ...]:
    """Return the broken rules about whether the degrees of parallelism and the batch sizes suit the number of GPUs.

    These rules apply to any model, so they are checked with a model of size 1.
    """
    batch = facts.values.get("train.global_batch_size") or 0
    if batch < 1:
        return ()
    smallest_model = Model(
        name=facts.name,
        num_layers=1,
        hidden_size=1,
        ffn_hidden_size=1,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=1,
        vocab_size=1,
    )
    workload = Workload(model=smallest_model, seq_length=1, global_batch_size=batch)
    return tuple(item for item in broken_rules(layout, workload, cluster) if item.rule in _RULES_OF_GRIDS)
