"""Rules for micro-batches: they must divide the global batch, and the interleaved schedule restricts their number."""

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Ints
from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, implies, remainder, rule

INTERLEAVED_SCHEDULE = (
    "megatron/core/pipeline_parallel/schedules.py, forward_backward_pipelining_with_interleaving"
)
BATCH_KNOBS = "tp pp cp micro_batch_size"
GROUP_KNOBS = f"{BATCH_KNOBS} vpp microbatch_group_size_per_vp_stage"


def _dense_grid_fits(columns: Columns, cluster: Cluster) -> Bools:
    """Return a mask of the rows where dp is a whole number; the rules of this module are meant for such rows only."""
    fits: Bools = cluster.world_size % (columns["tp"] * columns["pp"] * columns["cp"]) == 0
    return fits


def _samples_per_micro_batch(columns: Columns, cluster: Cluster) -> Ints:
    """Return micro_batch_size * dp, the samples in one micro-batch of all replicas together; 1 if dp is not whole."""
    dp = data_parallel_size(cluster.world_size, columns["tp"], columns["pp"], columns["cp"])
    return np.where(_dense_grid_fits(columns, cluster), columns["micro_batch_size"] * dp, 1)


def _batch_divides(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    divides: Bools = workload.global_batch_size % _samples_per_micro_batch(columns, cluster) == 0
    return divides


def _interleaves(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows that use the interleaved schedule and have a whole number of micro-batches."""
    interleaved = (columns["vpp"] > 1) & (columns["pp"] > 1)
    return interleaved & _dense_grid_fits(columns, cluster) & _batch_divides(columns, workload, cluster)


def _group_size(columns: Columns) -> Ints:
    """Return the number of micro-batches per micro-batch group: the stated one, or else Megatron's default, pp."""
    stated = columns["microbatch_group_size_per_vp_stage"]
    return np.where(stated == 0, columns["pp"], stated)


def _group_in_range(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    group = _group_size(columns)
    micro_batches = workload.global_batch_size // _samples_per_micro_batch(columns, cluster)
    in_range = (columns["pp"] <= group) & (group <= micro_batches)
    return implies(_interleaves(columns, workload, cluster), in_range)


def _last_group_keeps_every_stage_busy(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    micro_batches = workload.global_batch_size // _samples_per_micro_batch(columns, cluster)
    rest = micro_batches % _group_size(columns)
    return implies(_interleaves(columns, workload, cluster), (rest == 0) | (rest >= columns["pp"]))


def _stated_group_differs_from_pp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    stated = columns["microbatch_group_size_per_vp_stage"]
    return implies(stated != 0, (columns["vpp"] > 1) & (stated != columns["pp"]))


def _micro_batches(layout: Layout, workload: Workload, cluster: Cluster) -> int:
    """Return the number of micro-batches that each data-parallel replica processes per step."""
    dp = data_parallel_size(cluster.world_size, layout.tp, layout.pp, layout.cp)
    return workload.global_batch_size // (layout.micro_batch_size * dp)


def _explain_batch(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    batch, size = workload.global_batch_size, layout.micro_batch_size
    dp = data_parallel_size(cluster.world_size, layout.tp, layout.pp, layout.cp)
    equation = remainder("global_batch_size", batch, f"micro_batch_size*dp = {size}*{dp}", size * dp)
    return f"{equation}: choose a micro-batch that divides {batch}/{dp}, or more tp, pp or cp for less dp"


def _explain_group_range(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    group = layout.microbatch_group_size_per_vp_stage or layout.pp
    return (
        f"interleaving (vpp {layout.vpp}) needs pp <= group <= micro-batches, but pp = {layout.pp}, group = {group}, "
        f"micro-batches = {_micro_batches(layout, workload, cluster)}: lower micro_batch_size, dp or pp, change the "
        "group, or set vpp 1"
    )


def _explain_group_remainder(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    micro_batches = _micro_batches(layout, workload, cluster)
    group = layout.microbatch_group_size_per_vp_stage or layout.pp
    return (
        f"interleaving (vpp {layout.vpp}) leaves micro-batches ({micro_batches}) % group ({group}) = "
        f"{micro_batches % group}, which must be 0 or at least pp ({layout.pp}): change micro_batch_size or the group, "
        "or set vpp 1"
    )


def _explain_needless_group(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    return (
        f"microbatch_group_size_per_vp_stage ({layout.microbatch_group_size_per_vp_stage}) has no effect with vpp "
        f"{layout.vpp} and pp {layout.pp}: it is read with vpp > 1 only, where 0 means pp; set it to 0"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "batch-by-micro-batch",
        "megatron",
        BATCH_KNOBS,
        holds=_batch_divides,
        message=_explain_batch,
        source="megatron/core/num_microbatches_calculator.py",
    ),
    rule(
        "interleaving-group-range",
        "megatron",
        GROUP_KNOBS,
        holds=_group_in_range,
        message=_explain_group_range,
        source=INTERLEAVED_SCHEDULE,
    ),
    rule(
        "interleaving-group-remainder",
        "megatron",
        GROUP_KNOBS,
        holds=_last_group_keeps_every_stage_busy,
        message=_explain_group_remainder,
        source=INTERLEAVED_SCHEDULE,
    ),
    rule(
        "group-only-if-it-differs",
        "canonical",
        "pp vpp microbatch_group_size_per_vp_stage",
        holds=_stated_group_differs_from_pp,
        message=_explain_needless_group,
        source="megatron/core/model_parallel_config.py sets it to pp",
    ),
)
