"""The step time of every layout, from physics and the cluster's figures; and of one layout, where it goes.

A step is `num_microbatches` passes of the slowest pipeline rank, the bubble while the pipeline fills and drains,
the messages between its ranks, what of the gradients' and parameters' collectives nothing hides, and the
optimizer. Every constant has a meaning and one value for all models and clusters. Those of the host, of unfused
attention and of the network's share were chosen, within what is plausible, to suit published step times as a whole
(vTrain's on A100s; for HOST_EXPERTS Megatron Bridge's of mixtures); the others come from their sources.
Sources: Narayanan et al., arXiv:2104.04473 (pipeline schedules); Korthikanti et al., arXiv:2205.05198
(sequence parallelism, recompute); Rajbhandari et al., arXiv:1910.02054 (sharded optimizer).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.cluster import Cluster
from tuner.layout import Layout, data_parallel_size, expert_data_parallel_size, num_microbatches
from tuner.parameters import attention, dense_mlp, expert, norm, router, shared_experts
from tuner.predict import Implementation
from tuner.predict.collectives import Floats, Group, gather_ms, group, reduce_ms, send_ms
from tuner.predict.layers import Layers, Module, Pass
from tuner.predict.stages import Stages, stages
from tuner.rules.base import Columns, Ints
from tuner.rules.pipeline import stage_slots
from tuner.workload import Model, Workload

HOST_FORWARD_MS: Final = 0.9
"""The host's work to launch a dense layer's forward pass in eager PyTorch: some 45 operations of 20 us."""
HOST_BACKWARD_MS: Final = 1.3
"""The same backward; autograd's engine calls less Python."""
HOST_COLLECTIVE_MS: Final = 0.02
"""To launch one collective: an operation like the others."""
HOST_EXPERTS: Final = 3.0
"""A layer of experts costs the host as much as this many dense ones: router, permutes, dispatch."""
OPTIMIZER_BYTES: Final = 30
"""Moved for a parameter by Adam: read and write master, two moments (fp32), read gradient, write parameter."""
CLEAR_PASSES: Final = 2
"""Passes over the local gradients beside it: zeroed, and read for their norm."""
BUCKET_PARAMETERS: Final = 40_000_000
"""Megatron's DDP sends buckets of at least these (ddp_bucket_size); the last one's collective has no cover."""

BACKWARD_SHARE: Final = 2 / 3
"""Of a micro-batch's pass: backward, beside which gradients travel; parameters travel beside the rest."""

CHUNK_ROWS: Final = 32_768
"""Rows at a time: their arrays stay in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Where a step goes, in ms; the parts sum to the step. Of the slowest pipeline rank, all micro-batches."""

    gemm_ms: float
    attention_ms: float
    """Core attention."""
    elementwise_ms: float
    """Norms, residuals, activations, permutes, loss: what the GPU's memory bounds."""
    host_ms: float
    """What launching kernels adds where the GPU waits for the host."""
    tp_ms: float
    """Collectives of tensor and sequence parallelism that nothing hides; likewise the others."""
    cp_ms: float
    ep_ms: float
    recompute_ms: float
    """Forward passes taken again in backward, their collectives included."""
    bubble_ms: float
    p2p_ms: float
    """Messages between pipeline ranks."""
    dp_ms: float
    """Gradients reduced and parameters gathered, of dense layers and of experts."""
    optimizer_ms: float

    @property
    def total_ms(self) -> float:
        """The step time."""
        return float(sum(getattr(self, part) for part in PARTS))


PARTS: Final[tuple[str, ...]] = tuple(part.name for part in fields(StepTime))


def step_time_ms(
    table: pd.DataFrame,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
) -> NDArray[np.float64]:
    """The predicted step time in ms of every row of a table of layouts (columns as KNOBS).

    Raises:
        InputError: if the cluster states no peak for the workload's precision.
    """
    found = np.empty(len(table))
    for start in range(0, len(table), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        parts = _parts(Columns.of(table.iloc[rows]), workload, cluster, implementation)
        found[rows] = sum(parts[name] for name in PARTS)
    return found


def breakdown(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
) -> StepTime:
    """Where the step of one layout goes; raises as `step_time_ms`."""
    parts = _parts(Columns.single(layout), workload, cluster, implementation)
    return StepTime(**{name: float(np.ravel(value)[0]) for name, value in parts.items()})


@dataclass(frozen=True, slots=True)
class _Work:
    """One layer, one head or one embedding, and one micro-batch, forward and backward."""

    on_stage: Floats
    """How many of it the first, a middle and the last pipeline rank hold, shape [3, rows]."""
    in_model: Floats | int
    """How many the whole model has."""
    useful: Pass
    recompute_ms: Floats | float
    host_ms: Floats
    """What waiting for the host adds."""

    @property
    def total_ms(self) -> Floats:
        return self.useful.total + self.recompute_ms + self.host_ms


def _parts(
    c: Columns, workload: Workload, cluster: Cluster, implementation: Implementation
) -> dict[str, Floats]:
    """Every part of the step, an array of as many values as there are rows."""
    layers, split = Layers(workload, cluster, c, implementation), stages(workload, c)
    works = _works(layers, split, c, workload)
    dp = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"])
    count = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)

    stage_ms = _sum(work.on_stage * work.total_ms for work in works)
    slowest = np.argmax(stage_ms, axis=0)
    held = [(_at(work.on_stage, slowest), work) for work in works]
    parts = {
        part.name: count * _sum(number * getattr(work.useful, part.name) for number, work in held)
        for part in fields(Pass)
    }
    parts["host_ms"] = count * _sum(number * work.host_ms for number, work in held)
    parts["recompute_ms"] = count * _sum(number * work.recompute_ms for number, work in held)
    slowest_ms = _at(stage_ms, slowest)
    # While the pipeline fills and drains, a rank waits for one pass of all the others, a chunk at a time.
    others_ms = _sum(work.in_model * work.total_ms for work in works) - slowest_ms
    parts["bubble_ms"] = np.maximum(others_ms, 0.0) / c["vpp"]
    parts["p2p_ms"] = _p2p_ms(c, layers, count, cluster)
    parts |= _between_steps(c, workload, cluster, layers, split, slowest_ms)
    return {name: np.broadcast_to(parts[name], count.shape) for name in PARTS}


def _works(layers: Layers, split: Stages, c: Columns, workload: Workload) -> list[_Work]:
    """All that the ranks hold."""
    share = _recomputed_share(c, workload)
    works = [
        _work(layers.head(), Pass(), 0.0, split.heads, split.heads.sum(axis=0), 1.0, c),
        _work(layers.embedding(), Pass(), 0.0, split.embeddings, 1, 0.0, c),
    ]
    for kind, on_stage in split.layers.items():
        modules = layers.modules(kind)
        whole = Module(Pass(), Pass())
        for module in modules.values():
            whole += module
        again, relaunched = layers.recomputed(kind, modules, share)
        launches = HOST_EXPERTS if kind.moe else 1.0
        works.append(_work(whole, again, relaunched, on_stage, split.totals[kind], launches, c))
    return works


def _work(
    module: Module,
    again: Pass,
    relaunched: Floats | float,
    on_stage: Floats,
    in_model: Floats | int,
    launches: float,
    c: Columns,
) -> _Work:
    """A module with what the host adds, to which it is `launches` dense layers, and `relaunched` in backward."""
    # An all-reduce, or under sequence parallelism its two halves, for each half of a layer.
    collectives = 2 * HOST_COLLECTIVE_MS * (c["tp"] > 1) * (1 + c.on("sp"))
    forward_host = launches * (HOST_FORWARD_MS + collectives)
    backward_host = launches * (HOST_BACKWARD_MS + collectives) + relaunched * forward_host
    waits = _waits(forward_host, module.forward.total)
    waits = waits + _waits(backward_host, module.backward.total + again.total)
    return _Work(on_stage, in_model, module.forward + module.backward, again.total, waits)


def _waits(host_ms: Floats, gpu_ms: Floats | float) -> Floats:
    """What the host adds: it runs ahead of the GPU, so that the slower of the two counts."""
    waits: Floats = np.maximum(host_ms - gpu_ms, 0.0)
    return waits


def _sum(terms: Iterable[Floats]) -> Floats:
    """The sum of one or more arrays."""
    return reduce(add, terms)


def _at(of_stage: Floats, stage: NDArray[np.intp]) -> Floats:
    """The value of each row's stage."""
    value: Floats = np.take_along_axis(of_stage, stage[None], axis=0)[0]
    return value


def _recomputed_share(c: Columns, workload: Workload) -> Floats:
    """The share of a middle rank's layers that full recompute drops: all, or by block so many of each chunk."""
    layers = np.maximum(stage_slots(c, workload).middle, 1)
    block = np.minimum(c["recompute_num_layers"] * c["vpp"] / layers, 1.0)
    return np.where(c.among("recompute_method", "block"), block, 1.0)


def _p2p_ms(c: Columns, layers: Layers, count: Ints, cluster: Cluster) -> Floats:
    """Activations and gradients between ranks: each micro-batch's where nothing overlaps, else the filling's."""
    pp, vpp = c["pp"], c["vpp"]
    spread = np.where(c.on("sp"), c["tp"], 1)
    sent = layers.tokens / spread * layers.state_bytes * layers.hidden_size
    crosses = np.broadcast_to(cluster.world_size > cluster.nvlink_domain_gpus, pp.shape)
    once = 2 * send_ms(sent, crosses, cluster)
    exposed = np.where(c.on("overlap_p2p_comm"), 0, count * vpp)
    return np.where(pp > 1, once * (exposed + pp - 1), 0.0)


def _between_steps(
    c: Columns, workload: Workload, cluster: Cluster, layers: Layers, split: Stages, pass_ms: Floats
) -> dict[str, Floats]:
    """Gradients, optimizer and parameters, of the rank that holds the most; `pass_ms` is its last micro-batch's."""
    world = cluster.world_size
    tp, pp, cp, ep, etp = (c[name] for name in ("tp", "pp", "cp", "ep", "etp"))
    replicas = group(data_parallel_size(world, tp, pp, cp) * cp, tp, cluster)
    expert_replicas = group(expert_data_parallel_size(world, pp, ep, etp), ep * etp, cluster)
    dense, routed = _held_parameters(workload.model, split, c)
    exposed = _exposed_ms(dense, replicas, pass_ms, layers, c, cluster)
    exposed = exposed + _exposed_ms(routed, expert_replicas, pass_ms, layers, c, cluster)
    sharded = c.on("use_distributed_optimizer")
    updated = dense / np.where(sharded, replicas.size, 1) + routed / np.where(
        sharded, expert_replicas.size, 1
    )
    cleared = CLEAR_PASSES * (dense + routed) * layers.gradient_bytes
    return {"dp_ms": exposed, "optimizer_ms": (OPTIMIZER_BYTES * updated + cleared) / layers.bytes_per_ms}


def _exposed_ms(
    held: Floats, ranks: Group, pass_ms: Floats, layers: Layers, c: Columns, cluster: Cluster
) -> Floats:
    """What nothing hides of reducing the gradients of `held` parameters and, if sharded, gathering these."""
    sharded = c.on("use_distributed_optimizer")
    gradients = held * layers.gradient_bytes
    scatter, whole = gather_ms(gradients, ranks, cluster), reduce_ms(gradients, ranks, cluster)
    reduced = np.where(sharded, scatter, whole)
    gathered = np.where(sharded, gather_ms(held * layers.state_bytes, ranks, cluster), 0.0)
    covered = 1 - np.minimum(BUCKET_PARAMETERS / np.maximum(held, 1), 1.0)
    beside = np.minimum(reduced * covered, BACKWARD_SHARE * pass_ms) * c.on("overlap_grad_reduce")
    before = np.minimum(gathered * covered, (1 - BACKWARD_SHARE) * pass_ms) * c.on("overlap_param_gather")
    exposed = reduced - beside + gathered - before
    return np.where((ranks.size > 1) & (held > 0), exposed, 0.0)


def _held_parameters(model: Model, split: Stages, c: Columns) -> tuple[Floats, Floats]:
    """Dense and routed-expert parameters of the rank that holds the most of each."""
    tp = c["tp"]
    vocabulary = model.padded_vocab_size(1) * model.hidden_size / tp
    own_heads = np.minimum(split.heads, 1.0)
    if model.share_embeddings_and_output_weights:
        own_heads = own_heads * (1 - split.embeddings)
    dense = (split.embeddings + own_heads) * vocabulary
    routed = np.zeros_like(dense)
    for kind, count in split.layers.items():
        around = attention(model)
        sharded, replicated = around.sharded, around.replicated + 2 * norm(model)
        mlp = shared_experts(model) if kind.moe else dense_mlp(model)
        sharded, replicated = sharded + mlp.sharded, replicated + mlp.replicated
        if kind.moe:
            replicated += router(model)
            one = expert(model)
            local = (model.num_moe_experts or 0) / c["ep"]
            routed = routed + count * local * (one.sharded / c["etp"] + one.replicated)
        dense = dense + count * (sharded / tp + replicated)
    return dense.max(axis=0), routed.max(axis=0)
