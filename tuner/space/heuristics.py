"""The published heuristics as seeds: what the guide would choose here, as valid rows of the layout table.

`tuner.space.guide` holds what the guide says; this module applies it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, log2

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, KNOBS, Layout, layout_from
from tuner.core.parameters import active_parameters, total_parameters
from tuner.core.workload import Workload
from tuner.rules.validity import RULES, broken_rules
from tuner.space.guide import DenseRow, Guide, MoeRow, Range, Recipe, SequenceRow, read_guide

GRID_WEIGHTS: Mapping[str, float] = {"tp": 2.0, "pp": 1.0, "cp": 1.0, "ep": 1.0, "etp": 4.0}
"""What a doubling or halving of each size costs when a seed moves. Ours: the guide scales by PP, EP and CP,
sizes TP by the model and the NVLink domain, and hardly ever uses ETP."""

SHAPE_SIZES = ("vpp", "micro_batch_size")
SHAPE_CHOICES = ("sp", "recompute_granularity")
ROUNDED_SIZE = 0.05
"""Published sizes are rounded (Llama 3 70B has 70.6e9 parameters): this near a row's end, the next counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """A layout to try before the search, since a published heuristic leads to it."""

    layout: Layout
    row: int
    """Its label in the table's index."""
    source: str
    """The guide's section and row, `+` what the sequence length added. Several that lead to the same layout
    are joined by `; `, those that had to move marked `(moved)`."""
    note: str
    """How the first of the sources had to move, and whether it lacks virtual stages; empty if neither."""


@dataclass(frozen=True, slots=True)
class _Advice:
    """What the guide would choose, valid here or not."""

    layout: Layout
    source: str


def seeds(workload: Workload, cluster: Cluster, table: pd.DataFrame) -> tuple[Seed, ...]:
    """The guide's choices for `workload` on `cluster`, best first, each a row of `table`, none twice.

    `table` has one column a knob (`KNOBS`) and one valid layout a row. The order: the row of the model's own
    size or name, with what the sequence length adds; the other steps of its ranges; the next row for a size
    at its end; the combined recipes; last the key patterns for experts, the network for a dense model (its
    TP=8 is for those: the guide sizes TP of experts by what is active). Where the table lacks a layout, the
    nearest takes its place and the note says so. An empty table gives no seeds.
    """
    if table.empty:
        return ()
    grids = table[list(GRID_WEIGHTS)].drop_duplicates()
    found: dict[int, Seed] = {}
    for advice in _advice(workload, cluster, read_guide()):
        position = _nearest(table, grids, advice.layout)
        layout = layout_from({name: table[name].iloc[position] for name in KNOBS})
        row = int(table.index[position])
        moved = _moved(advice.layout, layout)
        source = advice.source + (" (moved)" if moved else "")
        note = _note(advice.layout, layout, moved, workload, cluster)
        known = found.get(row, Seed(layout=layout, row=row, source=source, note=note))
        sources = dict.fromkeys([*known.source.split("; "), source])
        found[row] = replace(known, source="; ".join(sources))
    return tuple(found.values())


def _advice(workload: Workload, cluster: Cluster, guide: Guide) -> Iterator[_Advice]:
    """The guide's choices, best first, before anything is held against the table."""
    sequence = next(row for row in reversed(guide.sequence) if workload.seq_length >= row.from_tokens)
    if workload.model.is_moe:
        bases = list(_moe_bases(workload, cluster, guide))
    else:
        bases = list(_dense_bases(workload, cluster, sequence, guide))
    for number, base in enumerate(bases):
        # Only the first varies in cp: each further seed costs a trial.
        for cp in _steps(sequence.cp) if number == 0 else sequence.cp[:1]:
            yield _complete(base, max(cp, base.layout.cp), sequence, workload, guide)
        if number == 0 and sequence.cp[0] > base.layout.cp:
            yield _complete(base, base.layout.cp, sequence, workload, guide)


def _complete(base: _Advice, cp: int, sequence: SequenceRow, workload: Workload, guide: Guide) -> _Advice:
    """Fill in what a row leaves open: SP and CP by the sequence, interleaving, a start that spares memory."""
    layout = base.layout
    # Megatron refuses to train experts with TP but without SP, whatever the length.
    sp = layout.tp > 1 and (layout.sp or sequence.sp or workload.model.is_moe)
    full = replace(
        layout,
        cp=cp,
        sp=sp,
        vpp=guide.virtual_stages if layout.pp > 1 else 1,
        recompute_granularity="selective",
    )
    by_length = cp > layout.cp or (sp and sequence.sp and not layout.sp)
    without = " without its CP" if cp < sequence.cp[0] else ""
    added = f" + {guide.sections['sequence']}: {sequence.name}{without}" if by_length else ""
    return _Advice(full, base.source + added)


def _dense_bases(
    workload: Workload, cluster: Cluster, sequence: SequenceRow, guide: Guide
) -> Iterator[_Advice]:
    billions = total_parameters(workload.model) / 1e9
    own = next((row for row in guide.dense if billions < row.parameters_billions[1]), guide.dense[-1])
    rows = [own, *(row for row in guide.dense if row != own and _ends_near(row, billions))]
    first = _by_size(own, billions)
    for row in rows:
        start = _by_size(row, billions)
        steps = (
            Layout(tp=tp, pp=pp, cp=cp) for tp, pp, cp in product(*map(_steps, (row.tp, row.pp, row.cp)))
        )
        for layout in (start, *(layout for layout in steps if layout != start)):
            yield _Advice(layout, f"{guide.sections['dense']}: {row.name}")
    contextual = max(first.cp, sequence.cp[0]) > 1
    for recipe in guide.recipes:
        if recipe.model is None and first.pp > 1 and (recipe.cp > 1) == contextual:
            yield _recipe(recipe, guide)
    yield _topology(first, cluster, guide)


def _moe_bases(workload: Workload, cluster: Cluster, guide: Guide) -> Iterator[_Advice]:
    model = workload.model
    total, active = total_parameters(model) / 1e9, active_parameters(model) / 1e9

    def distance(row: MoeRow) -> tuple[bool, float]:
        apart = abs(log2(row.total_billions / total)) + abs(log2(row.active_billions / active))
        return row.model != model.name, apart

    row = min(guide.moe, key=distance)
    nearest = "" if row.model == model.name else "nearest in size, "
    yield _Advice(
        Layout(tp=row.tp, pp=row.pp, cp=row.cp, ep=row.ep), f"{guide.sections['moe']}: {nearest}{row.name}"
    )
    for recipe in guide.recipes:
        if recipe.model == row.model:
            yield _recipe(recipe, guide)
    by_active = min(guide.moe, key=lambda row: abs(log2(row.active_billions / active)))
    by_total = min(guide.moe, key=lambda row: abs(log2(row.total_billions / total)))
    experts = model.num_moe_experts or 1
    # The guide leaves open how many experts a GPU holds: as few as these stages leave room for, then one.
    for ep in dict.fromkeys((gcd(experts, max(1, cluster.world_size // by_total.pp)), experts)):
        parts = f"TP of {by_active.name}, PP of {by_total.name}, EP = {experts}/{experts // ep}"
        yield _Advice(
            Layout(tp=by_active.tp, pp=by_total.pp, ep=ep), f"{guide.sections['patterns']}: {parts}"
        )


def _recipe(recipe: Recipe, guide: Guide) -> _Advice:
    layout = Layout(tp=recipe.tp, pp=recipe.pp, cp=recipe.cp, ep=recipe.ep, sp=recipe.sp)
    return _Advice(layout, f"{guide.sections['recipes']}: {recipe.name}")


def _topology(by_size: Layout, cluster: Cluster, guide: Guide) -> _Advice:
    """What the network suggests; PP, where the guide leaves it open, by size, and at least 2."""
    if cluster.world_size <= max(cluster.gpus_per_node, cluster.nvlink_domain_gpus):
        network = "nvlink"
    elif cluster.fabric_bandwidth_gb_per_s >= guide.infiniband_from_gb_per_s:
        network = "infiniband"
    else:
        network = "ethernet"
    row = next(row for row in guide.topology if row.network == network)
    pp = row.pp or max(2, by_size.pp)
    return _Advice(Layout(tp=row.tp, pp=pp), f"{guide.sections['topology']}: {row.name}")


def _ends_near(row: DenseRow, billions: float) -> bool:
    low, high = row.parameters_billions
    return low * (1 - ROUNDED_SIZE) <= billions <= high * (1 + ROUNDED_SIZE)


def _by_size(row: DenseRow, billions: float) -> Layout:
    """The step of each of the row's ranges that the model's size takes in the row, both on a log scale."""
    low, high = row.parameters_billions
    share = log2(billions / low) / log2(high / low) if low else 0.0
    share = min(max(share, 0.0), 1.0)
    return Layout(tp=_step(row.tp, share), pp=_step(row.pp, share), cp=_step(row.cp, share))


def _steps(sizes: Range) -> tuple[int, ...]:
    """Every size of a range."""
    low, high = sizes
    return tuple(low * 2**step for step in range(int(log2(high // low)) + 1))


def _step(sizes: Range, share: float) -> int:
    """The size at `share` (0 to 1) of a range."""
    steps = _steps(sizes)
    return steps[round(share * (len(steps) - 1))]


def _nearest(table: pd.DataFrame, grids: pd.DataFrame, wanted: Layout) -> int:
    """The position in `table` of the layout nearest to `wanted`.

    First the device grid (`grids`: the table's, each once), by the weighted squares of the doublings between;
    squares share a move among the sizes rather than putting it on one. Then whether it interleaves, then the
    rest of the schedule and the recompute, then the fewest other knobs off their default. Ties go to fewer
    pipeline stages, then less TP, CP and EP, then to the first row.
    """
    apart = np.zeros(len(grids))
    for name, weight in GRID_WEIGHTS.items():
        apart += weight * _doublings(grids[name], getattr(wanted, name)) ** 2
    ties = [grids[name].to_numpy() for name in ("etp", "ep", "cp", "tp", "pp")]
    best = grids.iloc[int(np.lexsort((*ties, apart.round(9)))[0])]
    same = np.logical_and.reduce([table[name].to_numpy() == best[name] for name in GRID_WEIGHTS])
    positions = np.flatnonzero(same)
    rows = table.iloc[positions]
    flat = (rows["vpp"] > 1).to_numpy() != (wanted.vpp > 1)
    shape = np.zeros(len(rows))
    for name in SHAPE_SIZES:
        shape += _doublings(rows[name], getattr(wanted, name)) ** 2
    for name in SHAPE_CHOICES:
        shape += (rows[name] != getattr(wanted, name)).to_numpy()
    return int(positions[np.lexsort((_off_default(rows), shape.round(9), flat))[0]])


def _doublings(column: "pd.Series[int]", wanted: int) -> NDArray[np.float64]:
    """How many doublings lie between each value and the wanted one."""
    return np.abs(np.log2(column.to_numpy(dtype=np.float64)) - log2(wanted))


def _off_default(rows: pd.DataFrame) -> NDArray[np.float64]:
    """How many knobs that no seed asks for are off their default, one number a row."""
    count = np.zeros(len(rows))
    for name in KNOBS:
        if name not in GRID_WEIGHTS and name not in SHAPE_SIZES and name not in SHAPE_CHOICES:
            count += (rows[name] != DEFAULTS[name]).to_numpy()
    # A short last stage is worth more than a short first one: it also holds the output layer and the loss.
    return count + 0.5 * (rows["num_layers_in_first_pipeline_stage"] != 0).to_numpy()


def _moved(wanted: Layout, found: Layout) -> frozenset[str]:
    """The knobs of the guide's rows that differ."""
    return frozenset(name for name in (*GRID_WEIGHTS, "sp") if getattr(wanted, name) != getattr(found, name))


def _note(wanted: Layout, found: Layout, moved: frozenset[str], workload: Workload, cluster: Cluster) -> str:
    """How a layout was moved, the rule that made it move, and whether it lacks virtual stages."""
    # The guide asks for virtual stages where they fit, and names no number.
    flat = f"no virtual stages fit pp={found.pp} here" if wanted.vpp > 1 and found.pp > found.vpp == 1 else ""
    if not moved:
        return flat
    knobs = {rule.id: rule.knobs for rule in RULES}
    broken = next((b for b in broken_rules(wanted, workload, cluster) if knobs[b.rule] & moved), None)
    reason = broken.message.split(": ")[0] if broken else "it is not among the layouts searched"
    move = f"guide says {_sizes(wanted)}, but {reason}: moved to {_sizes(found)}, the nearest valid"
    return f"{move}; {flat}" if flat else move


def _sizes(layout: Layout) -> str:
    sizes = [f"{name}={getattr(layout, name)}" for name in ("tp", "pp")]
    sizes += [f"{name}={getattr(layout, name)}" for name in ("cp", "ep", "etp") if getattr(layout, name) > 1]
    return " ".join([*sizes, *(["sp"] if layout.sp else [])])
