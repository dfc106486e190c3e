"""Peak memory of every layout, from what Megatron allocates: weights, gradients, Adam, activations and transients.

The peak is the largest sum of allocated tensors at any moment on any rank (`torch.cuda.max_memory_allocated`, or on CPU
the program's count of tensor bytes). tuner/predict/memory/overhead.py adds what the allocator reserves beyond that,
CUDA's context, and NCCL.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Floats
from tuner.core.layout import Layout, data_parallel_size
from tuner.core.workload import Model, Workload
from tuner.predict import graphs, offload
from tuner.predict.implementation import Implementation
from tuner.predict.memory.buffers import run_buffers
from tuner.predict.memory.moments import BUILD, MOMENTS, Moment, activation_peak
from tuner.predict.memory.share import RankShare
from tuner.predict.memory.stages import DENSE, MOE, StagesInFlight, stages_in_flight
from tuner.predict.memory.state import model_state

GIB = 1024**3
"""Bytes per GiB."""
ROWS_AT_ONCE = 50_000
"""Number of rows of a table that are predicted at once, which bounds the memory of a prediction and lets its arrays
stay in the processor's cache. Measured with `python -m tests.bench.memory`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """The parts of the peak memory of one rank of a pipeline stage, in GiB; they sum to `total_gib`."""

    rank: int
    """The pipeline rank of the stage."""
    moment: Moment
    """The moment of the peak, one of MOMENTS (tuner/predict/memory/moments.py)."""
    parameters_gib: float
    """Memory of weights, including quantised copies."""
    gradients_gib: float
    """Memory of gradients."""
    optimizer_gib: float
    """Memory of Adam's state."""
    buffers_gib: float
    """Memory of buffers: workspaces, empty gradients for gradient hooks, buffers of gathers, the weights and gradients
    that Megatron-FSDP has temporarily unsplit, and the tensors of CUDA graphs."""
    attention_gib: float
    """Memory that attention and the norm in front save for the backward pass, over all micro-batches in flight."""
    dense_mlp_gib: float
    """Memory that dense MLPs and the norm in front save for the backward pass, over all micro-batches in flight."""
    experts_gib: float
    """Memory that router, dispatch, experts and the norm in front save for the backward pass, over all micro-batches in
    flight."""
    checkpoints_gib: float
    """Memory of the saved inputs of recomputed layers."""
    loss_gib: float
    """Memory that the final norm, the output layer and the loss save for the backward pass."""
    transient_gib: float
    """Memory that exists only at the moment of the peak, in addition to all other parts."""

    @property
    def total_gib(self) -> float:
        """Return the peak, in GiB."""
        return float(sum(getattr(self, part) for part in MEMORY_PARTS))


MEMORY_PARTS: tuple[str, ...] = tuple(
    field.name for field in fields(StageMemory) if field.name.endswith("_gib")
)
"""The names of the fields of StageMemory that sum to the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _StageBytes:
    """The parts of StageMemory in bytes, for many stages: arrays of shape [stages]."""

    moment: NDArray[np.intp]
    parameters: Floats
    gradients: Floats
    optimizer: Floats
    buffers: Floats
    attention: Floats
    dense_mlp: Floats
    experts: Floats
    checkpoints: Floats
    loss: Floats
    transient: Floats

    def parts(self) -> Iterator[tuple[str, Floats]]:
        """Yield the name of each part, without the ending `_gib`, and its bytes."""
        for name in MEMORY_PARTS:
            part = name.removesuffix("_gib")
            yield part, getattr(self, part)

    def total(self) -> Floats:
        """Return the bytes at the peak: the sum of all parts, shape [stages]."""
        return reduce(add, (part_bytes for _, part_bytes in self.parts()))


def peak_gib(
    table: pd.DataFrame,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    imbalance: float | None = None,
) -> Floats:
    """Return the predicted peak memory in GiB of the worst rank, one value per row of a table of valid layouts.

    `imbalance` is the load of the busiest rank's experts divided by the mean load: 1 for balanced routing. None takes
    the load that is expected of the workload's router (tuner/predict/routing.py).
    """
    peaks = np.empty(len(table))
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        columns = Columns.of(table.iloc[rows])
        stages, held = _stage_bytes(columns, workload, cluster, implementation, imbalance, all_stages=False)
        first_stage_of_row = np.flatnonzero(np.diff(stages.row, prepend=-1))
        peaks[rows] = np.maximum.reduceat(held.total(), first_stage_of_row) / GIB
    return peaks


def memory_breakdown(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    imbalance: float | None = None,
) -> tuple[StageMemory, ...]:
    """Return the parts of the peak memory of each pipeline stage of a layout.

    The largest total of a stage is what `peak_gib` returns. `imbalance` is the load of the busiest rank's experts
    divided by the mean load; None takes the load that is expected of the workload's router.
    """
    columns = Columns.single(layout)
    stages, held = _stage_bytes(columns, workload, cluster, implementation, imbalance, all_stages=True)
    return tuple(
        StageMemory(
            rank=int(stages.rank[stage]),
            moment=MOMENTS[held.moment[stage]],
            **{f"{part}_gib": float(part_bytes[stage]) / GIB for part, part_bytes in held.parts()},
        )
        for stage in range(len(stages.row))
    )


def _stage_bytes(
    columns: Columns,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation,
    imbalance: float | None,
    *,
    all_stages: bool,
) -> tuple[StagesInFlight, _StageBytes]:
    """Return the stages of layouts, and the bytes of each part of each stage's peak memory.

    With `all_stages`, every stage of a layout is returned; otherwise only those that may need the most (see
    `stages_in_flight`).
    """
    dp = data_parallel_size(cluster.world_size, columns["tp"], columns["pp"], columns["cp"])
    stages = stages_in_flight(columns, workload, dp, all_stages=all_stages)
    stages = offload.keep_on_device(stages, columns, workload.model)
    share = RankShare(columns, workload, implementation, imbalance)
    vocabulary = _vocabulary(workload.model, columns)
    of_stage, mtp = vocabulary[stages.row], _mtp_layers(workload.model, stages)
    layers = stages.layers + mtp
    state = model_state(columns, workload, cluster, stages, layers=layers, vocabulary=of_stage)
    activations = activation_peak(share, stages, state, vocabulary, mtp)
    held = _StageBytes(
        moment=activations.moment,
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buffers=run_buffers(share, stages, layers, of_stage) + state.whole,
        attention=activations.attention,
        dense_mlp=activations.dense_mlp,
        experts=activations.experts,
        checkpoints=activations.checkpoints,
        loss=activations.loss,
        transient=activations.transient,
    )
    if graphs.captures(columns).any():
        in_flight = stages.in_flight[:, DENSE] + stages.in_flight[:, MOE]
        static = graphs.static_bytes(columns, stages.row, in_flight, share.state, activations.total())
        held = replace(held, buffers=held.buffers + static)
    return stages, _or_building(held, state.building)


def _or_building(held: _StageBytes, building: Floats) -> _StageBytes:
    """Return the parts of each stage's peak, either in training or while the model is built: the larger of both.

    `held` has the parts of the peak in training, and `building` has all bytes while the model is built, shape [stages].
    """
    builds = building > held.total()

    def unless_building(part_bytes: Floats) -> Floats:
        return np.where(builds, 0, part_bytes)

    beyond_model = building - held.parameters - held.gradients
    return _StageBytes(
        moment=np.where(builds, BUILD, held.moment),
        parameters=held.parameters,
        gradients=held.gradients,
        optimizer=unless_building(held.optimizer),
        buffers=unless_building(held.buffers),
        attention=unless_building(held.attention),
        dense_mlp=unless_building(held.dense_mlp),
        experts=unless_building(held.experts),
        checkpoints=unless_building(held.checkpoints),
        loss=unless_building(held.loss),
        transient=np.where(builds, beyond_model, held.transient),
    )


def _mtp_layers(model: Model, stages: StagesInFlight) -> Floats:
    """Return the number of layers of multi-token prediction on each stage, shape [stages, (DENSE, MOE)].

    One stage has all of them, and they are of the kind of the model's last layer.
    """
    count = np.where(stages.predicts, model.mtp_num_layers or 0, 0).astype(np.float64)
    moe = model.moe_layer_pattern()[-1]
    return np.stack([count * (not moe), count * moe], axis=1)


def _vocabulary(model: Model, columns: Columns) -> Floats:
    """Return the number of rows of the padded embedding (or output layer) on a rank, one value per layout."""
    sizes, index = np.unique(columns["tp"], return_inverse=True)
    return np.array([model.padded_vocab_size(int(tp)) / tp for tp in sizes])[index]
