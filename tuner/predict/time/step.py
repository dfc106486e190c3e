"""The predicted time of one optimizer step of every layout, and the parts into which it divides.

A step consists of `num_microbatches` passes of the slowest pipeline rank, the bubble while the pipeline fills and
drains, the messages between pipeline ranks, the exposed collectives of gradients and parameters, and the optimizer. On
CPU, a rank that shares a core leaves it to other ranks while it waits, so the total work of the ranks counts.

Each constant has a meaning and one value for all models and clusters. Three were chosen, within what is plausible, to
suit published step times as a whole: LAUNCH_MS and SCORE_PASSES suit vTrain's step times on A100s, and Transformer
Engine's EXPERTS_LAUNCHES suits Megatron Bridge's step times of models with experts. The other constants are measured,
published, counted or assumed, as the docstring of each says. A calibration of the machine replaces the figures that the
cluster states (rates.py).

Sources: Narayanan et al., arXiv:2104.04473 (pipeline schedules); Korthikanti et al., arXiv:2205.05198 (sequence
parallelism, recompute); Rajbhandari et al., arXiv:1910.02054 (sharded optimizer).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Final

import numpy as np
import pandas as pd

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Floats
from tuner.core.layout import Layout, data_parallel_size, num_microbatches
from tuner.core.workload import Workload
from tuner.predict import fsdp, offload
from tuner.predict.calibration import Calibration
from tuner.predict.implementation import Implementation
from tuner.predict.time.model_parts import model_parts
from tuner.predict.time.optimizer import optimizer_times
from tuner.predict.time.passes import PassTime
from tuner.predict.time.pipeline import messages_ms, pipeline_times
from tuner.predict.time.rates import MeasuredRates, Rates
from tuner.predict.time.stages import layers_by_rank

ROWS_AT_ONCE: Final = 32_768
"""Number of rows that are predicted together. Chosen so that their arrays stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The time of each part of a step, in milliseconds.

    The parts add up to the step time. Each is the time of the slowest pipeline rank, over all micro-batches.
    """

    gemm_ms: float
    """Time of matrix products outside core attention."""
    attention_ms: float
    """Time of core attention."""
    elementwise_ms: float
    """Time of norms, residuals, activations, permutes and loss: work that the rate of the GPU's memory bounds."""
    host_ms: float
    """Time that waiting for the host to launch operations adds."""
    tp_ms: float
    """Time of those collectives of tensor and sequence parallelism that no computation hides."""
    cp_ms: float
    """Time of the communication of context parallelism that no computation hides."""
    ep_ms: float
    """Time of the communication of expert parallelism that no computation hides."""
    recompute_ms: float
    """Time of the forward passes that the backward pass repeats, with their collectives."""
    bubble_ms: float
    """Time of waiting while the pipeline fills and drains."""
    p2p_ms: float
    """Time of those messages between pipeline ranks that no computation hides."""
    dp_ms: float
    """Time of reducing gradients and gathering parameters, as far as no computation hides it."""
    optimizer_ms: float
    """Time of updating the weights."""
    offload_ms: float
    """Time of moving activations to the host's memory and back, as far as no computation hides it."""

    @property
    def total_ms(self) -> float:
        """Return the step time in ms."""
        return float(sum(getattr(self, part) for part in STEP_PARTS))


STEP_PARTS: Final[tuple[str, ...]] = tuple(part.name for part in fields(StepTime))
"""The names of the parts of a step: the fields of StepTime."""


def step_time_ms(
    table: pd.DataFrame,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    calibration: Calibration | None = None,
) -> Floats:
    """Return the predicted step time in ms of every row of a table of layouts (one column per knob); shape [rows].

    With a calibration of the machine, measured times replace those that follow from the cluster's figures.

    Raises:
        InputError: if the cluster states no peak for the workload's precision.
    """
    rates = _rates(workload, cluster, calibration)
    times_ms = np.empty(len(table))
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        parts = _parts(Columns.of(table.iloc[rows]), workload, rates, implementation)
        times_ms[rows] = sum(parts[name] for name in STEP_PARTS)
    return times_ms


def step_parts_ms(
    table: pd.DataFrame,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    calibration: Calibration | None = None,
) -> pd.DataFrame:
    """Return the time in ms of each part of the predicted step for a table: one column per part, one row per layout.

    The parts are the fields of `StepTime`; arguments and errors are those of `step_time_ms`.
    """
    rates = _rates(workload, cluster, calibration)
    return pd.DataFrame(_parts(Columns.of(table), workload, rates, implementation), index=table.index)


def step_breakdown(
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    implementation: Implementation = "transformer_engine",
    calibration: Calibration | None = None,
) -> StepTime:
    """Return the time in ms of each part of one layout's predicted step.

    All arguments but the layout, and the errors, are those of `step_time_ms`.
    """
    rates = _rates(workload, cluster, calibration)
    parts = _parts(Columns.single(layout), workload, rates, implementation)
    return StepTime(**{name: float(np.ravel(value)[0]) for name, value in parts.items()})


def _rates(workload: Workload, cluster: Cluster, calibration: Calibration | None) -> Rates:
    return MeasuredRates(workload, cluster, calibration) if calibration else Rates(workload, cluster)


def _parts(c: Columns, workload: Workload, rates: Rates, implementation: Implementation) -> dict[str, Floats]:
    """Return the time in ms of every part of the step, by its name in STEP_PARTS, each of shape [rows]."""
    split = layers_by_rank(workload, c)
    model = model_parts(split, c, workload, rates, implementation)
    dp = data_parallel_size(rates.cluster.world_size, c["tp"], c["pp"], c["cp"])
    count = num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp)
    pipeline = pipeline_times(model, c, rates, count)

    def over_step(values: Iterable[Floats | float]) -> Floats:
        """Return a time in ms per step, given the time that each part of the model takes for one micro-batch."""
        return count * reduce(
            add, (number * value for number, value in zip(pipeline.counted, values, strict=True))
        )

    parts = {
        kind.name: over_step(getattr(part.useful, kind.name) for part in model) for kind in fields(PassTime)
    }
    parts["host_ms"] = over_step(part.host_ms for part in model)
    parts["recompute_ms"] = over_step(part.recompute_ms for part in model)
    parts |= {"bubble_ms": pipeline.bubble_ms, "p2p_ms": messages_ms(c, workload, rates, count)}
    parts |= optimizer_times(c, workload, rates, split, pass_ms=pipeline.slowest_ms, num_microbatches=count)
    forward_ms = (1 - fsdp.BACKWARD_SHARE) * pipeline.slowest_ms
    backward_ms = fsdp.BACKWARD_SHARE * pipeline.slowest_ms
    parts["offload_ms"] = count * offload.exposed_ms(c, workload, implementation, forward_ms, backward_ms)
    return {name: np.broadcast_to(parts[name], count.shape) for name in STEP_PARTS}
