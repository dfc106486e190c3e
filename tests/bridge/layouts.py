"""Valid layouts for a recipe: layouts drawn at random, and the recipe's own with a few knobs changed."""

import os
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, Layout, layout_from
from tuner.core.workload import Workload
from tuner.rules.validity import broken_rules
from tuner.space.domain import Domain, refined_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.placements import layer_placements

T = TypeVar("T")

_GRID = ("tp", "pp", "vpp", "cp", "ep", "etp", "sp", "micro_batch_size")
_SPLIT = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_RECOMPUTE = tuple(f"recompute_{what}" for what in ("granularity", "method", "num_layers", "modules"))
_TOGETHER: tuple[tuple[str, ...], ...] = (
    _RECOMPUTE,
    ("cuda_graph_impl", "cuda_graph_scope"),
    ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend"),
    ("use_megatron_fsdp", "data_parallel_sharding_strategy", "cuda_device_max_connections", "pp", "vpp"),
    ("cpu_offloading_num_layers", "recompute_granularity"),
)
"""Sets of knobs that are valid, or have an effect, only together."""
_PLACED = ("pipeline_model_parallel_layout", *_SPLIT)


def evenly(names: Sequence[T], most: int) -> list[T]:
    """Return names at even distances: `most` of them, or as many as MEGATUNE_BRIDGE_RECIPES says."""
    most = min(len(names), int(os.environ.get("MEGATUNE_BRIDGE_RECIPES", most)))
    return [names[place * len(names) // most] for place in range(most)]


def domain_of(workload: Workload, cluster: Cluster, config: Any) -> Domain:
    """Return the domain to draw a recipe's layouts from: it suits the settings that no layout states."""
    domain = dict(refined_domain(workload, cluster))
    if config.optimizer.use_precision_aware_optimizer:
        domain["use_distributed_optimizer"] = (True,)
    return domain


def drawn(workload: Workload, cluster: Cluster, domain: Domain, random: Random) -> Layout:
    """Return a random layout: grids and split from a few candidates each, then other knobs as far as they are valid."""
    while True:
        few = {knob: tuple(random.sample(domain[knob], min(4, len(domain[knob])))) for knob in _GRID}
        table = enumerate_layouts(workload, cluster, few | {knob: domain[knob] for knob in _SPLIT}).table
        if len(table):
            row = table.iloc[random.randrange(len(table))]
            layout = layout_from({str(knob): value for knob, value in row.items()})
            return _changed(layout, workload, cluster, domain, random, 20)


def changed(
    base: Layout, workload: Workload, cluster: Cluster, domain: Domain, random: Random
) -> Layout | None:
    """Return `base` with a few knobs changed; None if nothing changed or the result is not valid."""
    layout = _changed(base, workload, cluster, domain, random, 3, grid=True)
    return layout if not broken_rules(layout, workload, cluster) and layout != base else None


def _changed(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    domain: Domain,
    random: Random,
    times: int,
    grid: bool = False,
) -> Layout:
    chunks: tuple[str, ...] = ("pp", "vpp", "overlap_p2p_comm", *_PLACED)
    grouped = {*_PLACED, "vpp", *(knob for group in _TOGETHER for knob in group)}
    single = [(knob,) for knob in sorted(set(domain) - grouped - (set() if grid else set(_GRID)))]
    choices = [*single, *_TOGETHER, _PLACED, *((chunks,) if grid else ())]
    for _ in range(times):
        for _attempt in range(20):
            knobs = random.choice(choices)
            wanted: dict[str, Any] = {knob: random.choice(domain[knob]) for knob in knobs}
            if "pipeline_model_parallel_layout" in wanted:
                pp, vpp = wanted.get("pp", layout.pp), wanted.get("vpp", layout.vpp)
                placed = layer_placements(workload, pp, vpp) if pp > 1 else ()
                if placed and random.random() < 0.5:
                    wanted |= {knob: DEFAULTS[knob] for knob in _SPLIT}
                    wanted["pipeline_model_parallel_layout"] = random.choice(placed)
                else:
                    wanted["pipeline_model_parallel_layout"] = "none"
            candidate = replace(layout, **wanted)
            if not broken_rules(candidate, workload, cluster):
                layout = candidate
                break
    return layout
