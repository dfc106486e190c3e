"""Valid layouts for a recipe: drawn at random, and its own with a few knobs changed."""

from dataclasses import replace
from random import Random
from typing import Any

from tuner.cluster import Cluster
from tuner.layout import DEFAULTS, Layout, layout_from
from tuner.rules import broken_rules
from tuner.space import Domain, default_domain, enumerate_layouts
from tuner.workload import Workload

_GRID = ("tp", "pp", "vpp", "cp", "ep", "etp", "sp", "micro_batch_size")
_SPLIT = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_RECOMPUTE = tuple(f"recompute_{what}" for what in ("granularity", "method", "num_layers", "modules"))


def domain_of(workload: Workload, cluster: Cluster, config: Any) -> Domain:
    """What to draw from for a recipe: what goes with those of its settings that no layout states."""
    domain = dict(default_domain(workload, cluster))
    if config.optimizer.use_precision_aware_optimizer or config.ddp.use_megatron_fsdp:
        domain["use_distributed_optimizer"] = (True,)
    if config.model.cpu_offloading:
        domain |= {knob: (DEFAULTS[knob],) for knob in ("pp", "vpp", *_RECOMPUTE)}
    return domain


def drawn(workload: Workload, cluster: Cluster, domain: Domain, random: Random) -> Layout:
    """A layout at random: grids and split from a few candidates each, then the other knobs as far as they fit."""
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
    """`base` with a few knobs changed, where that is valid."""
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
    together: list[tuple[str, ...]] = [_RECOMPUTE, ("pp", "vpp", "overlap_p2p_comm", *_SPLIT)]
    single = sorted(set(domain) - set(_SPLIT) - set(_RECOMPUTE) - {"vpp"} - (set() if grid else set(_GRID)))
    choices = [(knob,) for knob in single] + (together if grid else together[:1])
    for _ in range(times):
        for _attempt in range(20):
            wanted: dict[str, Any] = {knob: random.choice(domain[knob]) for knob in random.choice(choices)}
            candidate = replace(layout, **wanted)
            if not broken_rules(candidate, workload, cluster):
                layout = candidate
                break
    return layout
