"""The step time of every layout, from physics and the cluster's figures; and of one layout, where it goes.

A step is `num_microbatches` passes of the slowest pipeline rank, the bubble while the pipeline fills and drains,
the messages between its ranks, what of the gradients' and parameters' collectives nothing hides, and the
optimizer. CPU ranks that share cores lend theirs while they wait: of those the cores' work is what counts.
Every constant has a meaning and one value for all models and clusters. The time of a launch and unfused attention's
passes were chosen, within what is plausible, to suit published step times as a whole (vTrain's on A100s; for
EXPERTS_LAUNCHES of Transformer Engine Megatron Bridge's of mixtures); the others were counted or have their source.
A calibration of the machine takes the place of what the cluster states (rates.py).
Sources: Narayanan et al., arXiv:2104.04473 (pipeline schedules); Korthikanti et al., arXiv:2205.05198
(sequence parallelism, recompute); Rajbhandari et al., arXiv:1910.02054 (sharded optimizer).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Ints
from tuner.core.layout import Layout, data_parallel_size, expert_data_parallel_size, num_microbatches
from tuner.core.parameters import attention, dense_mlp, expert, layer_norms, router, shared_experts
from tuner.core.stages import stage_slots
from tuner.core.workload import Model, Workload
from tuner.predict import fsdp, graphs, nccl, offload
from tuner.predict.calibration import Calibration
from tuner.predict.implementation import Implementation
from tuner.predict.time.collectives import Floats, ProcessGroups, process_groups
from tuner.predict.time.context import attention_step_kernels
from tuner.predict.time.layers import Layers, Module, Pass
from tuner.predict.time.rates import MeasuredRates, Rates
from tuner.predict.time.stages import LayersByRank, layers_by_rank

FORWARD_LAUNCHES: Final = 80
"""Operations of a dense layer's forward pass that the host launches, or that make a view."""
BACKWARD_LAUNCHES: Final = 115
"""The same backward. Counted with a TorchDispatchMode over Megatron-Core's local layers: 195 in both, 108 of them
launched."""
EXPERTS_LAUNCHES: Final[Mapping[Implementation, tuple[float, float]]] = {
    "transformer_engine": (3.0, 0.0),
    "torch": (1.8, 0.18),
}
"""A layer of experts costs the host as much as so many dense ones, and so many more for each local expert: router,
permutes, dispatch. Of Megatron's local layers counted, with its experts one after the other."""
EXPERT_BIAS_LAUNCHES: Final = 0.06
"""What a bias adds for each local expert: split, weighed and added one after the other (experts.py, _apply_bias)."""
HEAD_LAUNCHES: Final = 0.9
"""The same of embedding, output layer and loss."""
CHUNK_LAUNCHES: Final = 0.25
"""The same of one pass of the pipeline's schedule over a chunk of the model: data, messages, bookkeeping. Profiled on
CPU: 0.5 ms beside a layer's 2.9, and the messages' launches."""
TENSOR_LAUNCHES: Final = 40
"""Operations of the optimizer for one tensor where nothing fuses them: torch's Adam on CPU, clipping and copies are
20, and the Python around takes as long."""
OPTIMIZER_BYTES: Final = 30
"""Moved for a parameter by Adam: read and write master, two moments (fp32), read gradient, write parameter."""
CLEAR_PASSES: Final = 2
"""Passes over the local gradients beside it: zeroed, and read for their norm."""
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
    offload_ms: float
    """Activations on their way to the host's memory and back that nothing hides."""

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
    calibration: Calibration | None = None,
) -> NDArray[np.float64]:
    """The predicted step time in ms of every row of a table of layouts (columns as KNOBS).

    With a calibration of the machine, what it measured replaces what the cluster states.

    Raises:
        InputError: if the cluster states no peak for the workload's precision.
    """
    rates = _rates(workload, cluster, calibration)
    found = np.empty(len(table))
    for start in range(0, len(table), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        parts = _parts(Columns.of(table.iloc[rows]), workload, rates, implementation)
        found[rows] = sum(parts[name] for name in PARTS)
    return found


def breakdown(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    calibration: Calibration | None = None,
) -> StepTime:
    """Where the step of one layout goes; as `step_time_ms`, and raises the same."""
    rates = _rates(workload, cluster, calibration)
    parts = _parts(Columns.single(layout), workload, rates, implementation)
    return StepTime(**{name: float(np.ravel(value)[0]) for name, value in parts.items()})


def _rates(workload: Workload, cluster: Cluster, calibration: Calibration | None) -> Rates:
    return MeasuredRates(workload, cluster, calibration) if calibration else Rates(workload, cluster)


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


def _parts(c: Columns, workload: Workload, rates: Rates, implementation: Implementation) -> dict[str, Floats]:
    """Every part of the step, an array of as many values as there are rows."""
    layers, split = Layers(workload, rates, c, implementation), layers_by_rank(workload, c)
    works = _works(layers, split, c, workload, rates, implementation)
    dp = data_parallel_size(rates.cluster.world_size, c["tp"], c["pp"], c["cp"])
    count = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)

    stage_ms = _sum(work.on_stage * work.total_ms for work in works)
    slowest = np.argmax(stage_ms, axis=0)
    slowest_ms = _at(stage_ms, slowest)
    whole_ms = _sum(work.in_model * work.total_ms for work in works)
    # While the pipeline fills and drains, a rank waits for one pass of all the others, a chunk at a time.
    filled_ms = count * slowest_ms + np.maximum(whole_ms - slowest_ms, 0.0) / c["vpp"]
    if rates.ranks_per_core > 1:
        held = [(work.in_model / c["pp"], work) for work in works]
        bubble_ms = _shared_bubble_ms(c, rates, count * whole_ms / c["pp"], slowest_ms, filled_ms)
    else:
        held = [(_at(work.on_stage, slowest), work) for work in works]
        bubble_ms = filled_ms - count * slowest_ms
    parts = {
        part.name: count * _sum(number * getattr(work.useful, part.name) for number, work in held)
        for part in fields(Pass)
    }
    parts["host_ms"] = count * _sum(number * work.host_ms for number, work in held)
    parts["recompute_ms"] = count * _sum(number * work.recompute_ms for number, work in held)
    parts |= {"bubble_ms": bubble_ms, "p2p_ms": _p2p_ms(c, workload, rates, count)}
    parts |= _between_steps(c, workload, rates, split, slowest_ms, count)
    forward_ms, backward_ms = (1 - fsdp.BACKWARD_SHARE) * slowest_ms, fsdp.BACKWARD_SHARE * slowest_ms
    parts["offload_ms"] = count * offload.exposed_ms(c, workload, implementation, forward_ms, backward_ms)
    return {name: np.broadcast_to(parts[name], count.shape) for name in PARTS}


def _shared_bubble_ms(
    c: Columns, rates: Rates, busy_ms: Floats, slowest_ms: Floats, filled_ms: Floats
) -> Floats:
    """The bubble of a pipeline whose ranks share cores; `busy_ms` is the mean of their work.

    A rank that waits lends its core to the others, so that the cores' work is the mean of the ranks'. But cores
    idle while the first stages alone have work and the last alone still have, and a chain of passes that wait for
    each other goes no faster than a core each.
    """
    cores = rates.cluster.world_size / rates.ranks_per_core
    of_stage = rates.cluster.world_size / c["pp"]
    stages_short = np.ceil(cores / of_stage) - 1
    idle = stages_short - of_stage * stages_short * (stages_short + 1) / 2 / cores
    lost_ms = idle * slowest_ms / c["vpp"] / rates.ranks_per_core
    waits: Floats = np.maximum(lost_ms, filled_ms / rates.ranks_per_core - busy_ms)
    return waits


def _works(
    layers: Layers,
    split: LayersByRank,
    c: Columns,
    workload: Workload,
    rates: Rates,
    implementation: Implementation,
) -> list[_Work]:
    """All that the ranks hold."""
    share = _recomputed_share(c, workload)
    works = [
        _work(layers.head(), Pass(), 0.0, split.heads, split.heads.sum(axis=0), HEAD_LAUNCHES, c, rates),
        _work(layers.embedding(), Pass(), 0.0, split.embeddings, 1, 0.0, c, rates),
    ]
    schedule = CHUNK_LAUNCHES * c["pp"] * c["vpp"] / workload.model.num_layers
    for kind, on_stage in split.layers.items():
        modules = layers.modules(kind)
        whole = Module(Pass(), Pass())
        for module in modules.values():
            whole += module
        again, relaunched = layers.recomputed(kind, modules, share)
        launches = schedule + 1.0
        if kind.moe:
            of_layer, of_expert = EXPERTS_LAUNCHES[implementation]
            of_expert += EXPERT_BIAS_LAUNCHES * workload.model.add_bias_linear
            launches = schedule + of_layer + of_expert * (workload.model.num_moe_experts or 0) / c["ep"]
        left = graphs.launches(c, kind.moe, launches)
        works.append(_work(whole, again, relaunched, on_stage, split.totals[kind], left, c, rates))
    return works


def _work(
    module: Module,
    again: Pass,
    relaunched: Floats | float,
    on_stage: Floats,
    in_model: Floats | int,
    launches: Floats | float,
    c: Columns,
    rates: Rates,
) -> _Work:
    """A module with what the host adds, to which it is `launches` dense layers, and `relaunched` in backward."""
    # An all-reduce, or under sequence parallelism its two halves, for each half of a layer; a ring's steps.
    collectives = 2 * (c["tp"] > 1) * (1 + c.on("sp")) + attention_step_kernels(c)
    forward_host = rates.launch_ms * (launches * FORWARD_LAUNCHES + collectives)
    backward_host = rates.launch_ms * (launches * BACKWARD_LAUNCHES + collectives) + relaunched * forward_host
    backward_ms = module.backward.total + again.total
    if graphs.captures(c).any():
        eager = ~graphs.whole_iteration(c)
        forward_host, backward_host = forward_host * eager, backward_host * eager
    if rates.host_runs_ahead:
        # The slower of the two counts.
        forward_host = np.maximum(forward_host - module.forward.total, 0.0)
        backward_host = np.maximum(backward_host - backward_ms, 0.0)
    useful = module.forward + module.backward
    return _Work(on_stage, in_model, useful, again.total, forward_host + backward_host)


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


def _p2p_ms(c: Columns, workload: Workload, rates: Rates, count: Ints) -> Floats:
    """Activations and gradients between ranks: each micro-batch's where nothing overlaps, else the filling's."""
    pp, vpp = c["pp"], c["vpp"]
    spread = np.where(c.on("sp"), c["tp"], 1) * c["cp"]
    tokens = c["micro_batch_size"] * workload.seq_length / spread
    pipeline = process_groups(pp, rates.cluster.world_size // pp, rates.cluster)
    once = 2 * rates.send_ms(tokens * workload.model.hidden_size * rates.state_bytes, pipeline)
    hidden = c.on("overlap_p2p_comm") & rates.host_runs_ahead
    exposed = np.where(hidden, 0, count * vpp)
    return np.where(pp > 1, once * (exposed + pp - 1), 0.0)


def _between_steps(
    c: Columns, workload: Workload, rates: Rates, split: LayersByRank, pass_ms: Floats, count: Ints
) -> dict[str, Floats]:
    """Gradients, optimizer and parameters, of the rank that holds the most; `pass_ms` is its last micro-batch's."""
    world = rates.cluster.world_size
    tp, pp, cp, ep, etp = (c[name] for name in ("tp", "pp", "cp", "ep", "etp"))
    replicas = process_groups(data_parallel_size(world, tp, pp, cp) * cp, tp, rates.cluster)
    expert_replicas = process_groups(expert_data_parallel_size(world, pp, ep, etp), ep * etp, rates.cluster)
    dense, routed = _held_parameters(workload.model, split, c)
    exposed = _exposed_ms(dense, replicas, pass_ms, c, rates)
    exposed = exposed + _exposed_ms(routed, expert_replicas, pass_ms, c, rates)
    sharded = c.on("use_megatron_fsdp")
    if sharded.any():
        layers = _sum(split.layers.values()).max(axis=0)
        ours, theirs = (
            fsdp.exposed_ms(held, ranks, layers, pass_ms, count, c, rates)
            for held, ranks in ((dense, replicas), (routed, expert_replicas))
        )
        exposed = np.where(sharded, ours + theirs, exposed)
    of_dense, of_routed = (fsdp.shares(c, ranks.size) for ranks in (replicas, expert_replicas))
    dense_ranks, routed_ranks = of_dense.optimizer, of_routed.optimizer
    updated = dense / dense_ranks + routed / routed_ranks
    cleared = (
        CLEAR_PASSES * (dense / of_dense.gradients + routed / of_routed.gradients) * rates.gradient_bytes
    )
    optimizer = rates.moved_ms(OPTIMIZER_BYTES * updated + cleared)
    if not rates.host_runs_ahead:
        tensors = _held_tensors(workload.model, split, c, dense_ranks, routed_ranks)
        optimizer = optimizer + TENSOR_LAUNCHES * rates.launch_ms * tensors
    return {"dp_ms": exposed, "optimizer_ms": optimizer}


def _exposed_ms(held: Floats, ranks: ProcessGroups, pass_ms: Floats, c: Columns, rates: Rates) -> Floats:
    """What nothing hides of reducing the gradients of `held` parameters and, if sharded, gathering these."""
    sharded, hides = c.on("use_distributed_optimizer"), rates.host_runs_ahead
    gradients = held * rates.gradient_bytes
    registered = nccl.registered_factor(c, ranks)
    in_switches = nccl.all_reduce_factor(c, ranks, rates.cluster, rates.measured("all_reduce"))
    scatter = registered * rates.gather_ms(gradients, ranks, "reduce_scatter")
    reduced = np.where(sharded, scatter, in_switches * rates.reduce_ms(gradients, ranks))
    gathered = np.where(sharded, registered * rates.gather_ms(held * rates.parameter_bytes, ranks), 0.0)
    # The last bucket's collective has no cover.
    covered = hides * (1 - np.minimum(fsdp.LEAST_BUCKET / np.maximum(held, 1), 1.0))
    beside = np.minimum(reduced * covered, fsdp.BACKWARD_SHARE * pass_ms) * c.on("overlap_grad_reduce")
    before = np.minimum(gathered * covered, (1 - fsdp.BACKWARD_SHARE) * pass_ms) * c.on(
        "overlap_param_gather"
    )
    exposed = reduced - beside + gathered - before
    return np.where((ranks.size > 1) & (held > 0), exposed, 0.0)


def _held_tensors(model: Model, split: LayersByRank, c: Columns, dense_ranks: Ints, routed_ranks: Ints) -> Floats:
    """Weights that the optimizer of the rank with the most has: of a layer, an embedding, a head, and the experts."""
    dense = split.embeddings + 2 * split.heads
    routed = np.zeros_like(dense)
    for kind, count in split.layers.items():
        around = 2 + (5 if model.multi_latent_attention else 2) + 2 * model.qk_layernorm
        mlp = 1 + 2 * bool(model.moe_shared_expert_intermediate_size) if kind.moe else 2
        dense = dense + count * (around + mlp)
        if kind.moe:
            routed = routed + count * 2 * (model.num_moe_experts or 0) / c["ep"]
    tensors: Floats = dense.max(axis=0) / dense_ranks + routed.max(axis=0) / routed_ranks
    return tensors


def _held_parameters(model: Model, split: LayersByRank, c: Columns) -> tuple[Floats, Floats]:
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
        sharded, replicated = around.sharded, around.replicated + layer_norms(model)
        mlp = shared_experts(model) if kind.moe else dense_mlp(model)
        sharded, replicated = sharded + mlp.sharded, replicated + mlp.replicated
        if kind.moe:
            replicated += router(model)
            one = expert(model)
            local = (model.num_moe_experts or 0) / c["ep"]
            routed = routed + count * local * (one.sharded / c["etp"] + one.replicated)
        dense = dense + count * (sharded / tp + replicated)
    return dense.max(axis=0), routed.max(axis=0)
