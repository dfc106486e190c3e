"""The layouts that the parallelism guide recommends for a workload and a cluster, whether or not they are valid there.

`tuner.space.guide` holds the tables of the guide, which Megatron Bridge publishes; this module applies them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, log2

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.parameters import active_parameters, total_parameters
from tuner.core.workload import Workload
from tuner.space.guide import DenseRow, Guide, MoeRow, Range, Recipe, SequenceRow

ROUNDED_SIZE = 0.05
"""If the size of a model is this close to the end of a row's range of sizes, the model gets the layouts of the next row
too. The unit is a share of the size at that end. Assumed: published sizes are rounded (Llama 3 70B has 70.6e9
parameters)."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One layout that the parallelism guide recommends."""

    layout: Layout
    """The recommended layout; it may break rules of megatune (`tuner.rules`)."""
    source: str
    """The section and the row of the parallelism guide that lead to the layout; if the sequence length changed it, also
    a `+` and the row for that length."""


def advice_for(workload: Workload, cluster: Cluster, guide: Guide) -> Iterator[Advice]:
    """Yield the layouts that the parallelism guide recommends, best first.

    For a dense model they come from these tables of the guide: the row for the model's size, with every combination of
    the sizes in the row's ranges; the neighbouring row, if the model's size is close to the end of its row; the
    combined recipes; and the row for the cluster's network.

    For a mixture of experts they come from the row for the model's name, or else for the nearest size; then from the
    combined recipes for that row's model; and then from the key patterns. The rows for networks are not used: their
    TP=8 is for dense models, and the guide sizes TP of a mixture of experts by its active parameters.
    """
    sequence = next(row for row in reversed(guide.sequence) if workload.seq_length >= row.from_tokens)
    if workload.model.is_moe:
        bases = list(_moe_bases(workload, cluster, guide))
    else:
        bases = list(_dense_bases(workload, cluster, sequence, guide))
    for index, base in enumerate(bases):
        # Only the first base varies in cp, since each further seed costs a trial.
        for cp in sizes_of(sequence.cp) if index == 0 else sequence.cp[:1]:
            yield _completed(base, max(cp, base.layout.cp), sequence, workload, guide)
        if index == 0 and sequence.cp[0] > base.layout.cp:
            yield _completed(base, base.layout.cp, sequence, workload, guide)


def sizes_of(size_range: Range) -> tuple[int, ...]:
    """Return every size of a range: the lowest, and its doublings up to the highest."""
    low, high = size_range
    return tuple(low * 2**doublings for doublings in range(int(log2(high // low)) + 1))


def _completed(base: Advice, cp: int, sequence: SequenceRow, workload: Workload, guide: Guide) -> Advice:
    """Return a layout `base` of the guide, with `cp`, sequence parallelism, virtual stages and recomputation set.

    The row that the layout comes from leaves these open. Sequence parallelism depends on the sequence length; selective
    recomputation is chosen because it saves memory.
    """
    layout = base.layout
    # Megatron refuses to train experts with TP but without SP, whatever the sequence length.
    sp = layout.tp > 1 and (layout.sp or sequence.sp or workload.model.is_moe)
    completed = replace(
        layout,
        cp=cp,
        sp=sp,
        vpp=guide.virtual_stages if layout.pp > 1 else 1,
        recompute_granularity="selective",
    )
    by_length = cp > layout.cp or (sp and sequence.sp and not layout.sp)
    without_cp = " without its CP" if cp < sequence.cp[0] else ""
    addition = f" + {guide.sections['sequence']}: {sequence.name}{without_cp}" if by_length else ""
    return Advice(completed, base.source + addition)


def _dense_bases(
    workload: Workload, cluster: Cluster, sequence: SequenceRow, guide: Guide
) -> Iterator[Advice]:
    """Yield the layouts recommended for a dense model, best first; each sets only the sizes of a row."""
    billions = total_parameters(workload.model) / 1e9
    row_of_size = next((row for row in guide.dense if billions < row.parameters_billions[1]), guide.dense[-1])
    neighbours = [row for row in guide.dense if row != row_of_size and _ends_near(row, billions)]
    for row in (row_of_size, *neighbours):
        start = _by_size(row, billions)
        grids = product(sizes_of(row.tp), sizes_of(row.pp), sizes_of(row.cp))
        steps = (Layout(tp=tp, pp=pp, cp=cp) for tp, pp, cp in grids)
        for layout in (start, *(layout for layout in steps if layout != start)):
            yield Advice(layout, f"{guide.sections['dense']}: {row.name}")
    first = _by_size(row_of_size, billions)
    uses_cp = max(first.cp, sequence.cp[0]) > 1
    for recipe in guide.recipes:
        if recipe.model is None and first.pp > 1 and (recipe.cp > 1) == uses_cp:
            yield _from_recipe(recipe, guide)
    yield _from_network(first, cluster, guide)


def _moe_bases(workload: Workload, cluster: Cluster, guide: Guide) -> Iterator[Advice]:
    """Yield the layouts recommended for a mixture of experts, best first; each sets only the sizes of a row."""
    model = workload.model
    total_billions, active_billions = total_parameters(model) / 1e9, active_parameters(model) / 1e9

    def total_doublings(row: MoeRow) -> float:
        return abs(log2(row.total_billions / total_billions))

    def active_doublings(row: MoeRow) -> float:
        return abs(log2(row.active_billions / active_billions))

    row = min(
        guide.moe,
        key=lambda row: (row.model != model.name, total_doublings(row) + active_doublings(row)),
    )
    nearest = "" if row.model == model.name else "nearest in size, "
    layout = Layout(tp=row.tp, pp=row.pp, cp=row.cp, ep=row.ep)
    yield Advice(layout, f"{guide.sections['moe']}: {nearest}{row.name}")
    for recipe in guide.recipes:
        if recipe.model == row.model:
            yield _from_recipe(recipe, guide)
    by_active, by_total = min(guide.moe, key=active_doublings), min(guide.moe, key=total_doublings)
    experts = model.num_moe_experts or 1
    # The guide leaves open how many experts a GPU holds: first as few as the GPUs of a stage allow, then one.
    for ep in dict.fromkeys((gcd(experts, max(1, cluster.world_size // by_total.pp)), experts)):
        pattern = f"TP of {by_active.name}, PP of {by_total.name}, EP = {experts}/{experts // ep}"
        layout = Layout(tp=by_active.tp, pp=by_total.pp, ep=ep)
        yield Advice(layout, f"{guide.sections['patterns']}: {pattern}")


def _from_recipe(recipe: Recipe, guide: Guide) -> Advice:
    layout = Layout(tp=recipe.tp, pp=recipe.pp, cp=recipe.cp, ep=recipe.ep, sp=recipe.sp)
    return Advice(layout, f"{guide.sections['recipes']}: {recipe.name}")


def _from_network(by_size: Layout, cluster: Cluster, guide: Guide) -> Advice:
    """Return the layout that the parallelism guide recommends for the cluster's network.

    If the guide leaves PP open, PP is that of `by_size`, but at least 2.
    """
    if cluster.world_size <= max(cluster.gpus_per_node, cluster.nvlink_domain_gpus):
        network = "nvlink"
    elif cluster.fabric_bandwidth_gb_per_s >= guide.infiniband_from_gb_per_s:
        network = "infiniband"
    else:
        network = "ethernet"
    row = next(row for row in guide.topology if row.network == network)
    pp = row.pp or max(2, by_size.pp)
    return Advice(Layout(tp=row.tp, pp=pp), f"{guide.sections['topology']}: {row.name}")


def _ends_near(row: DenseRow, billions: float) -> bool:
    """Return whether a model with `billions` * 10^9 parameters is in the row's range of sizes, or close to it.

    Both ends of the range are widened by ROUNDED_SIZE.
    """
    low, high = row.parameters_billions
    return low * (1 - ROUNDED_SIZE) <= billions <= high * (1 + ROUNDED_SIZE)


def _by_size(row: DenseRow, billions: float) -> Layout:
    """Return the layout that takes, from each range of sizes in the row, the size at the model's place.

    The model's place is 0 if its size (`billions`, in 10^9 parameters) is the row's lowest, and 1 if it is the highest;
    between them it is measured on a log scale.
    """
    low, high = row.parameters_billions
    place = log2(billions / low) / log2(high / low) if low else 0.0
    place = min(max(place, 0.0), 1.0)
    return Layout(tp=_size_at(row.tp, place), pp=_size_at(row.pp, place), cp=_size_at(row.cp, place))


def _size_at(size_range: Range, place: float) -> int:
    """Return one of the sizes of a range: the lowest at place 0, the highest at place 1, and another one between."""
    sizes = sizes_of(size_range)
    return sizes[round(place * (len(sizes) - 1))]
