"""Rows that need at least as much memory as a layout that ran out of it: pruned without a run, by memory alone."""

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import KNOBS, Layout, data_parallel_size, num_microbatches
from tuner.core.parameters import attention, dense_mlp, norm
from tuner.core.pipeline_layout import decoders
from tuner.core.stages import stage_slots
from tuner.core.workload import Workload
from tuner.predict.implementation import implementation_of

_RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
MESSAGE_STATES: Final = 4
"""Hidden states of one micro-batch that a pipeline's messages hold at most, where the schedule does not interleave:
input and gradient received, output and gradient sent (schedules.py)."""


def needs_at_least_as_much_memory(
    table: pd.DataFrame, layout: Layout, workload: Workload, cluster: Cluster
) -> NDArray[np.bool_]:
    """Which rows provably need no less memory than `layout`, itself included.

    All other knobs are equal, and each of these moves only upwards, so that every tensor of the layout's peak has a
    counterpart at least as large in the row's:

    - micro_batch_size: activations in flight are min(pp, M) micro-batches of gbs/(dp*M) samples, which never shrink;
      plain Torch also keeps tensors a micro-batch (see `_as_many_in_flight`);
    - recompute: where it is dropped altogether (see `_keeps_more_without_recompute`);
    - use_distributed_optimizer: without it the state is held whole instead of in shards, on CUDA; Gloo copies the
      gradients that it scatters, and the copy may outweigh the shards;
    - nccl_nvls_enable: on, NCCL takes its buffers beside all else;
    - cpu_offloading_num_layers: none, so that every layer's activations stay; between two counts the moments at which
      they leave differ;
    - pp: fewer stages of more layers each, where `_merges_stages` proves it.

    The other knobs are equal, though some are almost sure: FSDP gathers and scatters through buffers that a small
    model's weights do not outweigh, graphs and registered buffers have memory of their own kind, and expandable
    segments make what is reserved smaller, which is no theorem.
    """
    stages = table["pp"].to_numpy()
    mask = _no_smaller(table, layout, _keeps_more_without_recompute(layout, workload, cluster))
    if cluster.device == "cpu":
        mask &= table["use_distributed_optimizer"].to_numpy() == layout.use_distributed_optimizer
    if implementation_of(cluster) == "torch":
        larger = table["micro_batch_size"].to_numpy() > layout.micro_batch_size
        mask &= ~larger | _as_many_in_flight(table, workload, cluster)
    mask &= (stages == layout.pp) | _merges_stages(table, layout, workload, cluster)
    return mask


def _no_smaller(table: pd.DataFrame, layout: Layout, may_drop_recompute: bool) -> NDArray[np.bool_]:
    """Where every knob but pp is equal or moves upwards."""
    mask: NDArray[np.bool_] = np.ones(len(table), dtype=bool)
    recompute = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        column, value = table[knob].to_numpy(), getattr(layout, knob)
        if knob == "micro_batch_size":
            mask &= column >= value
        elif knob == "use_distributed_optimizer":
            mask &= (column == value) | ~column.astype(bool)
        elif knob == "nccl_nvls_enable":
            mask &= (column == value) | column.astype(bool)
        elif knob == "cpu_offloading_num_layers":
            mask &= (column == value) | (column == 0)
        elif knob in _RECOMPUTE:
            recompute &= column == value
        elif knob != "pp":
            mask &= column == value
    if may_drop_recompute:
        recompute |= table["recompute_granularity"].to_numpy() == "none"
    return mask & recompute


def _as_many_in_flight(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> NDArray[np.bool_]:
    """Where as many micro-batches are in flight as the pipeline takes: a larger one then keeps no fewer of them.

    Torch's attention keeps rotary tables and masks, which are as large for one sample as for many: with few
    micro-batches in flight, a larger micro-batch keeps fewer of these.
    """
    c = Columns.of(table)
    dp = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"])
    group = np.where(
        c["microbatch_group_size_per_vp_stage"] > 0, c["microbatch_group_size_per_vp_stage"], c["pp"]
    )
    # Interleaved, 2 * (pp - 1) + (vpp - 1) * group + 2 chunks at most, of num_microbatches * vpp.
    most = c["pp"] + np.where(c["vpp"] > 1, group, 0)
    return num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp) >= most


def _keeps_more_without_recompute(layout: Layout, workload: Workload, cluster: Cluster) -> bool:
    """Whether a stage without recompute keeps no less than with the layout's, two kinds of which are not compared.

    Recomputing brings back what the layers in question keep, beside their inputs and the output made again: at most
    four hidden states a layer, and a layer keeps more (input, norm's output, sum, norm's output, and what is between).
    So without recompute twice the layers recomputed at once outweigh it. Torch's context parallel attention is left
    out: recomputed, it keeps what came in and not what was gathered, which may be more.
    """
    torch = implementation_of(cluster) == "torch"
    if torch and layout.recompute_granularity == "selective" and layout.cp > 1:
        return False
    at_once = layout.recompute_num_layers if layout.recompute_method == "uniform" else 1
    return _fewest_layers(layout, workload) >= 2 * at_once


def _fewest_layers(layout: Layout, workload: Workload) -> int:
    """Layers of the pipeline rank that has the fewest, or less."""
    if layout.pipeline_model_parallel_layout != "none":
        layers = decoders(layout.pipeline_model_parallel_layout).reshape(-1, layout.pp)
        return int(layers.sum(axis=0).min())
    slots = stage_slots(Columns.single(layout), workload)
    accounts = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    return int(min(part[0] for part in (slots if layout.pp > 2 else (slots.first, slots.last)))) - accounts


def _merges_stages(
    table: pd.DataFrame, layout: Layout, workload: Workload, cluster: Cluster
) -> NDArray[np.bool_]:
    """Where k stages of the layout are merged into one, and nothing that this takes away goes uncovered.

    1F1B over layers that are all alike, n a stage, M micro-batches of b samples: stage s keeps
    min(pp - s, M) * b samples of n layers. Merged, world size and global batch given, there are pp/k stages of k*n
    layers, k*dp ranks, and b' >= b samples a micro-batch with M' * b' = M * b / k. Stage s lies in s' = s // k, so
    pp - s <= k * (pp/k - s'), and what s' keeps, min(pp/k - s', M') * b' samples of k*n layers, is no less.
    Chunks, uneven splits and those that are written out, experts (whose tokens follow the routing), checkpoints of
    several layers, prediction of further tokens and FSDP (whose shards shrink as dp grows) break one of these steps.
    """
    model, stages = workload.model, table["pp"].to_numpy()
    split = layout.num_layers_in_first_pipeline_stage or layout.num_layers_in_last_pipeline_stage
    accounts = layout.account_for_embedding_in_pipeline_split or layout.account_for_loss_in_pipeline_split
    alike = not model.is_moe and model.window_attn_skip_freq is None and not model.mtp_num_layers
    split = split or layout.pipeline_model_parallel_layout != "none" or layout.use_megatron_fsdp
    if layout.vpp > 1 or split or accounts or not alike:
        return np.zeros(len(table), dtype=np.bool_)
    merged: NDArray[np.bool_] = (stages < layout.pp) & (layout.pp % stages == 0)
    if layout.recompute_granularity == "full" and (
        layout.recompute_method != "uniform" or layout.recompute_num_layers > 1
    ):
        merged &= table["recompute_granularity"].to_numpy() == "none"
    if cluster.device == "cuda":
        merged &= stages > 1  # without a pipeline NCCL has no buffers for its messages
    distributed = table["use_distributed_optimizer"].to_numpy()
    merged &= _added_bytes(stages, layout, workload) >= _taken_bytes(distributed, layout, workload, cluster)
    return merged


def _added_bytes(stages: NDArray[np.int64], layout: Layout, workload: Workload) -> NDArray[np.float64]:
    """Weights and gradients of the layers that a stage gains where there are only `stages`."""
    model = workload.model
    layer = (attention(model).sharded + dense_mlp(model).sharded) / layout.tp
    layer += attention(model).replicated + dense_mlp(model).replicated + 2 * norm(model)
    weight = 4 if workload.precision == "fp32" else 2
    gradient = 4 if workload.grad_reduce_in_fp32 else weight
    gained: NDArray[np.float64] = model.num_layers / stages - model.num_layers / layout.pp
    return gained * layer * (weight + gradient)


def _taken_bytes(
    distributed: NDArray[np.bool_], layout: Layout, workload: Workload, cluster: Cluster
) -> NDArray[np.float64]:
    """At most what merging takes from a stage's peak.

    Messages with a stage that is now its own part; the gradient of the embedding, which comes when a merged stage
    has freed more layers; and, where the optimizer is distributed, a part of the vocabulary's shard of its state,
    which shrinks as dp grows. The layers' shards keep their size: k times the layers over k times the ranks.
    """
    model, tp = workload.model, layout.tp
    weight, adam = (4, 8) if workload.precision == "fp32" else (2, 12)
    learned = model.position_embedding_type == "learned_absolute"
    rows = model.padded_vocab_size(tp) / tp + (model.max_position_embeddings if learned else 0)
    dp = data_parallel_size(cluster.world_size, tp, layout.pp, layout.cp)
    shard = np.where(distributed, adam / (dp * layout.cp), 0)
    tokens = workload.seq_length * layout.micro_batch_size / layout.cp / (tp if layout.sp else 1)
    taken: NDArray[np.float64] = (rows * model.hidden_size + norm(model)) * (weight + shard)
    return taken + MESSAGE_STATES * tokens * model.hidden_size * weight
