"""Micro-batches: how the fixed global batch is cut, and how many of them the interleaved schedule wants."""

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Ints
from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, remainder, rule

SCHEDULES = "megatron/core/pipeline_parallel/schedules.py, forward_backward_pipelining_with_interleaving"
BATCH_KNOBS = "tp pp cp micro_batch_size"


def _grid_fits(c: Columns, k: Cluster) -> Bools:
    """Without a whole dense grid there is no dp, hence nothing for the rules here to judge."""
    fits: Bools = k.world_size % (c["tp"] * c["pp"] * c["cp"]) == 0
    return fits


def _step_samples(c: Columns, k: Cluster) -> Ints:
    """mbs*dp: the samples that one micro-batch on every replica takes."""
    dp = data_parallel_size(k.world_size, c["tp"], c["pp"], c["cp"])
    return np.where(_grid_fits(c, k), c["micro_batch_size"] * dp, 1)


def _cut_evenly(c: Columns, w: Workload, k: Cluster) -> Bools:
    even: Bools = w.global_batch_size % _step_samples(c, k) == 0
    return even


def _interleaved(c: Columns, w: Workload, k: Cluster) -> Bools:
    return (c["vpp"] > 1) & (c["pp"] > 1) & _grid_fits(c, k) & _cut_evenly(c, w, k)


def _group(c: Columns) -> Ints:
    group = c["microbatch_group_size_per_vp_stage"]
    return np.where(group == 0, c["pp"], group)


def _group_in_range(c: Columns, w: Workload, k: Cluster) -> Bools:
    group, microbatches = _group(c), w.global_batch_size // _step_samples(c, k)
    return ~_interleaved(c, w, k) | ((c["pp"] <= group) & (group <= microbatches))


def _last_group_full(c: Columns, w: Workload, k: Cluster) -> Bools:
    rest = w.global_batch_size // _step_samples(c, k) % _group(c)
    holds: Bools = ~_interleaved(c, w, k) | (rest == 0) | (rest >= c["pp"])
    return holds


def _numbers(x: Layout, w: Workload, k: Cluster) -> tuple[int, int]:
    """Micro-batches a step and the group size, of one layout."""
    dp = data_parallel_size(k.world_size, x.tp, x.pp, x.cp)
    return w.global_batch_size // (x.micro_batch_size * dp), x.microbatch_group_size_per_vp_stage or x.pp


def _explain_batch(x: Layout, w: Workload, k: Cluster) -> str:
    dp = data_parallel_size(k.world_size, x.tp, x.pp, x.cp)
    equation = remainder(
        "global_batch_size",
        w.global_batch_size,
        f"micro_batch_size*dp = {x.micro_batch_size}*{dp}",
        x.micro_batch_size * dp,
    )
    return (
        f"{equation}: choose a micro-batch that divides {w.global_batch_size}/{dp}, or more tp, pp or cp "
        "for less dp"
    )


def _explain_range(x: Layout, w: Workload, k: Cluster) -> str:
    microbatches, group = _numbers(x, w, k)
    return (
        f"interleaving (vpp {x.vpp}) needs pp <= group <= micro-batches, but pp = {x.pp}, group = {group}, "
        f"micro-batches = {microbatches}: lower micro_batch_size, dp or pp, change the group, or set vpp 1"
    )


def _explain_rest(x: Layout, w: Workload, k: Cluster) -> str:
    microbatches, group = _numbers(x, w, k)
    return (
        f"interleaving (vpp {x.vpp}) leaves micro-batches ({microbatches}) % group ({group}) = "
        f"{microbatches % group}, which must be 0 or at least pp ({x.pp}): change micro_batch_size or the "
        "group, "
        "or set vpp 1"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "batch-by-micro-batch",
        "megatron",
        BATCH_KNOBS,
        holds=_cut_evenly,
        message=_explain_batch,
        source="megatron/core/num_microbatches_calculator.py",
    ),
    rule(
        "interleaving-group-range",
        "megatron",
        f"{BATCH_KNOBS} vpp microbatch_group_size_per_vp_stage",
        holds=_group_in_range,
        message=_explain_range,
        source=SCHEDULES,
    ),
    rule(
        "interleaving-group-remainder",
        "megatron",
        f"{BATCH_KNOBS} vpp microbatch_group_size_per_vp_stage",
        holds=_last_group_full,
        message=_explain_rest,
        source=SCHEDULES,
    ),
    rule(
        "group-only-if-it-differs",
        "canonical",
        "pp vpp microbatch_group_size_per_vp_stage",
        holds=lambda c, w, k: (
            (c["microbatch_group_size_per_vp_stage"] == 0)
            | ((c["vpp"] > 1) & (c["microbatch_group_size_per_vp_stage"] != c["pp"]))
        ),
        message=lambda x, w, k: (
            f"microbatch_group_size_per_vp_stage ({x.microbatch_group_size_per_vp_stage}) says nothing with "
            "vpp "
            f"{x.vpp} and pp {x.pp}: it is read with vpp > 1 only, where 0 means pp; set it to 0"
        ),
        source="megatron/core/model_parallel_config.py sets it to pp",
    ),
)
