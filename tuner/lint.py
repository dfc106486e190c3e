"""Whether a training command would start, told without running it: broken rules, memory, what lies near. Pure."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.cluster import Cluster
from tuner.layout import KNOBS, Layout, expert_data_parallel_size, layout_from
from tuner.predict import implementation_of
from tuner.predict.memory import StageMemory, breakdown
from tuner.rules import Violation, broken_rules
from tuner.search.feasibility import fit_probabilities
from tuner.space import Domain, enumerate_layouts, search_domain
from tuner.workload import Workload

NEAREST: Final = 3
"""Valid layouts that are named beside one that is not."""
LIKELY: Final = 0.5
"""A layout that fits with less probability is expected to run out of memory."""

_SIZES: Final = ("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size")
_REFUSING: Final = frozenset({"megatron", "arguments"})
"""Kinds of rules whose breach ends the run; what breaks a policy starts, and may be slow."""


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

    @property
    def starts(self) -> bool:
        """Whether it would start, and is likely to fit."""
        return not self.refused and self.fits is not None and self.fits >= LIKELY


def judge(layout: Layout, workload: Workload, cluster: Cluster) -> Verdict:
    """Judge a layout of a workload on a cluster."""
    broken = broken_rules(layout, workload, cluster)
    refused = tuple(item for item in broken if item.kind in _REFUSING)
    policies = [item for item in broken if item.kind == "policy"]
    worst = fits = None
    if not refused:
        worst = max(
            breakdown(layout, workload, cluster, implementation_of(cluster)),
            key=lambda stage: stage.total_gib,
        )
        fits = float(fit_probabilities(pd.DataFrame([asdict(layout)]), workload, cluster)[0])
    near = () if fits is not None and fits >= LIKELY else nearest(layout, workload, cluster)
    warnings = [*(f"{item.rule}: {item.message}" for item in policies)]
    if not refused:
        warnings += _pitfalls(layout, workload, cluster)
    return Verdict(
        layout=layout, refused=refused, warnings=tuple(warnings), worst=worst, fits=fits, nearest=near
    )


def nearest(layout: Layout, workload: Workload, cluster: Cluster) -> tuple[Near, ...]:
    """The valid layouts that differ least from `layout`, those that are likely to fit first.

    A size differs by the logarithm to base 2 of the ratio, any other knob by 1.
    """
    table = enumerate_layouts(workload, cluster, _around(layout, workload, cluster)).table
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
    order = np.lexsort((distance, fits < LIKELY))[:NEAREST]
    return tuple(
        Near(layout=layout_from({str(k): v for k, v in table.iloc[row].items()}), fits=float(fits[row]))
        for row in order
    )


def _around(layout: Layout, workload: Workload, cluster: Cluster) -> Domain:
    """The grids of a default search, with the layout's own values and switches beside them."""
    searched = search_domain(workload, cluster)
    grid = {knob: tuple(searched.get(knob, ())) for knob in (*_SIZES, "sp")}
    split = {knob: tuple(searched.get(knob, ())) for knob in KNOBS if "pipeline" in knob}
    return {
        **{knob: (getattr(layout, knob),) for knob in KNOBS},
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
