"""Whether a training command would start, told without running it: broken rules, memory, what lies near. Pure."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, KNOBS, Layout, expert_data_parallel_size, layout_from
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
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import StageMemory, breakdown
from tuner.rules.rule import Violation
from tuner.rules.validity import RULES, broken_rules, gone_rules
from tuner.space.enumeration import Domain, enumerate_layouts, search_domain

NEAREST: Final = 3
"""Valid layouts that are named beside one that is not."""
LIKELY: Final = 0.5
"""A layout that fits with less probability is expected to run out of memory."""

_SIZES: Final = ("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size")
_REFUSING: Final = frozenset({"megatron", "arguments"})
"""Kinds of rules whose breach ends the run; what breaks a policy starts, and may be slow."""


_GRIDS: Final = frozenset({"dense-grid", "expert-grid", "batch-by-micro-batch"})
"""Rules that need no architecture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Near:
    """A valid layout near one that is not, or that does not fit."""

    layout: Layout
    fits: float
    """P(peak <= the GPU's memory)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is known of a layout before it runs."""

    layout: Layout
    refused: tuple[Violation, ...]
    """What Megatron would refuse, in the order of the rules."""
    warnings: tuple[str, ...]
    worst: StageMemory | None
    """The pipeline stage that needs the most memory; None where the layout cannot be."""
    fits: float | None
    """P(peak <= the GPU's memory); None likewise."""
    nearest: tuple[Near, ...]
    """Valid layouts that differ least, where this one is refused or not likely to fit."""

    memory_counts: bool = True
    """Whether the predicted memory is that of the job, and no bound that it stays below."""

    @property
    def starts(self) -> bool:
        """Whether it would start, and is likely to fit."""
        return not self.refused and (
            not self.memory_counts or (self.fits is not None and self.fits >= LIKELY)
        )


def judge(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    memory_counts: bool = True,
    asked: bool = False,
    said: tuple[Violation, ...] = (),
    lifted: Collection[str] = frozenset(),
) -> Verdict:
    """Judge a layout of a workload on a cluster.

    Args:
        layout: The layout.
        workload: What it trains.
        cluster: The GPUs.
        memory_counts: See Verdict.
        asked: Whether Bridge itself has resolved the layout: then its Megatron's own checks of the config count, of
            whatever release, and Megatron-LM's checks of its arguments are never made.
        said: What it refused then.
        lifted: Rules that its Megatron no longer asks, or the user does not.
    """
    broken = broken_rules(layout, workload, cluster, lifted)
    foreign = {item.rule for item in broken if asked and _is_bridges_own(item, bool(said))}
    refused = (*(item for item in broken if item.kind in _REFUSING and item.rule not in foreign), *said)
    policies = [item for item in broken if item.kind == "policy" or item.rule in foreign & _ADVICE]
    worst = fits = None
    if not set(refused) - set(said):
        worst = max(
            breakdown(layout, workload, cluster, implementation_of(cluster)),
            key=lambda stage: stage.total_gib,
        )
        fits = float(fit_probabilities(pd.DataFrame([asdict(layout)]), workload, cluster)[0])
    fine = fits is not None and (fits >= LIKELY or not memory_counts)
    near = () if fine else nearest(layout, workload, cluster, lifted)
    warnings = [*(f"{item.rule}: {item.message}" for item in policies)]
    if not refused:
        warnings += _pitfalls(layout, workload, cluster)
    return Verdict(
        layout=layout,
        refused=refused,
        warnings=tuple(warnings),
        worst=worst,
        fits=fits,
        nearest=near,
        memory_counts=memory_counts,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeVerdict:
    """What is known of a recipe of Megatron Bridge before it runs."""

    facts: RecipeFacts
    verdict: Verdict | None = None
    """None where its architecture cannot be stated."""
    refused: tuple[Violation, ...] = ()
    """Where there is no verdict: what the grids alone, or Bridge itself, refuse."""
    unjudged: str = ""
    """Why nothing else is known then."""
    notes: tuple[str, ...] = ()
    """What the recipe fixes that no layout states."""

    @property
    def state(self) -> str:
        """`starts`, `refused`, `too large` or `not judged`."""
        if self.refused or (self.verdict and self.verdict.refused):
            return "refused"
        if self.verdict is None:
            return "not judged"
        return "starts" if self.verdict.starts else "too large"


def judge_recipe(facts: RecipeFacts, cluster: Cluster, memory_is_known: bool = True) -> RecipeVerdict:
    """Judge a recipe as Bridge has resolved it, on as many GPUs as it was resolved for."""
    local = missing_on_this_machine(facts)
    if not facts.built:
        return RecipeVerdict(facts=facts, unjudged=local or f"Bridge cannot build it here: {facts.error}")
    said: tuple[Violation, ...] = ()
    if facts.error and not local:
        said = (Violation(rule="megatron-bridge", kind="arguments", message=facts.error, source=facts.frame),)
    beside = unmodelled_encoders(facts)
    notes = (*fixed_settings(facts), *([beside] if beside else []))
    reason = unstated_architecture(facts)
    try:
        layout = layout_of(facts.values, cluster)
        if reason is None:
            workload = workload_of(facts.values, facts.name)
            counts = memory_is_known and not memory_is_overstated(facts)
            gone = gone_rules(facts.megatron_core)
            verdict = judge(layout, workload, cluster, counts, asked=True, said=said, lifted=gone)
            return RecipeVerdict(facts=facts, verdict=verdict, notes=notes)
        said = (*_broken_grids(layout, facts, cluster), *said)
    except InputError as error:
        reason = reason or str(error)
    return RecipeVerdict(facts=facts, refused=said, unjudged=reason, notes=notes)


def _broken_grids(layout: Layout, facts: RecipeFacts, cluster: Cluster) -> tuple[Violation, ...]:
    """What the number of GPUs alone refuses, whatever the layers are."""
    any_model = Model(
        name=facts.name,
        num_layers=1,
        hidden_size=1,
        ffn_hidden_size=1,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=1,
        vocab_size=1,
    )
    batch = facts.values.get("train.global_batch_size") or 0
    if batch < 1:
        return ()
    workload = Workload(model=any_model, seq_length=1, global_batch_size=batch)
    return tuple(item for item in broken_rules(layout, workload, cluster) if item.rule in _GRIDS)


_CONFIG_CHECKS: Final = "transformer_config.py"
_ARGUMENT_CHECKS: Final = "megatron/training/arguments.py"
_ADVICE: Final = frozenset({"param-gather-overlap-needs-both"})
"""What Megatron-LM refuses and Bridge lets pass, to no good."""


def _is_bridges_own(item: Violation, refused: bool) -> bool:
    """Whether Bridge would have said so itself; where it stopped at its first complaint, ours may explain it."""
    return (_ARGUMENT_CHECKS in item.source and "Bridge" not in item.source) or (
        _CONFIG_CHECKS in item.source and not refused
    )


def refused_beside_bridge(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str]
) -> tuple[Violation, ...]:
    """What ends the run of a recipe that Bridge itself has resolved without complaint: the rules that it never asks."""
    return tuple(
        item
        for item in broken_rules(layout, workload, cluster, lifted)
        if item.kind == "program" or (item.kind in _REFUSING and not _is_bridges_own(item, refused=False))
    )


def nearest(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str] = frozenset()
) -> tuple[Near, ...]:
    """The valid layouts that differ least from `layout`, those that are likely to fit first.

    A size differs by the logarithm to base 2 of the ratio, any other knob by 1.
    """
    table = enumerate_layouts(
        workload, cluster, _around(layout, workload, cluster, lifted), lifted=lifted
    ).table
    if table.empty:
        return ()
    distance: NDArray[np.float64] = np.zeros(len(table))
    for knob in KNOBS:
        values, wanted = table[knob].to_numpy(), getattr(layout, knob)
        distance += (
            np.abs(np.log2(values.astype(float) / wanted))
            if knob in _SIZES
            else np.asarray(values != wanted, dtype=float)
        )
    fits = fit_probabilities(table, workload, cluster)
    table, fits, distance = table[distance > 0], fits[distance > 0], distance[distance > 0]
    order = np.lexsort((distance, fits < LIKELY))[:NEAREST]
    return tuple(
        Near(layout=layout_from({str(k): v for k, v in table.iloc[row].items()}), fits=float(fits[row]))
        for row in order
    )


def _around(layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str]) -> Domain:
    """The grids of a default search, with the layout's own values and switches beside them."""
    searched = search_domain(workload, cluster)
    grid = {knob: tuple(searched.get(knob, ())) for knob in (*_SIZES, "sp")}
    split = {knob: tuple(searched.get(knob, ())) for knob in KNOBS if "pipeline" in knob}
    # What a broken rule reads may change as well, to what breaks nothing.
    broken = {item.rule for item in broken_rules(layout, workload, cluster, lifted)}
    read = {knob for rule in RULES if rule.id in broken for knob in rule.knobs}
    switches = {knob for knob in read if isinstance(DEFAULTS[knob], bool)}
    return {
        **{knob: (getattr(layout, knob),) for knob in KNOBS},
        **{knob: tuple(dict.fromkeys((getattr(layout, knob), DEFAULTS[knob]))) for knob in read - switches},
        **dict.fromkeys(switches, (False, True)),
        **{
            knob: tuple(dict.fromkeys((getattr(layout, knob), *values)))
            for knob, values in {**grid, **split}.items()
        },
        "overlap_p2p_comm": (False, True),
    }


def _pitfalls(layout: Layout, workload: Workload, cluster: Cluster) -> Iterator[str]:
    """What starts, and costs. Source: Megatron Bridge, skills/perf-parallelism-strategies, pitfalls."""
    layers = workload.model.num_layers
    if layout.pp > 1 and layout.vpp == 1 and layers % layout.pp == 0 and layers // layout.pp > 1:
        yield (
            f"pp {layout.pp} without interleaving: the bubble is {layout.pp - 1} micro-batches long; "
            f"{layers} layers / pp {layout.pp} = {layers // layout.pp} a stage can be split (vpp)"
        )
    if layout.tp > 1 and not layout.sp:
        yield f"tp {layout.tp} without sequence parallelism: every rank keeps whole activations between its blocks"
    edp = expert_data_parallel_size(cluster.world_size, layout.pp, layout.ep, layout.etp)
    if workload.model.is_moe and layout.use_distributed_optimizer and edp == 1:
        yield (
            f"edp = {cluster.world_size} / (pp {layout.pp} * ep {layout.ep} * etp {layout.etp}) = 1: the experts' "
            "optimizer state is not sharded"
        )
    if not layout.use_distributed_optimizer:
        yield "no distributed optimizer: every data parallel rank keeps the whole optimizer state"
