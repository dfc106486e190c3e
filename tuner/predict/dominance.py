"""Rows that need at least as much memory as a layout that ran out of it. They are pruned without a run."""

from typing import Final

import numpy as np
import pandas as pd

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Floats, Ints
from tuner.core.layout import KNOBS, Layout, data_parallel_size, num_microbatches
from tuner.core.parameters import attention, dense_mlp, norm
from tuner.core.pipeline_layout import decoders
from tuner.core.stages import stage_slots
from tuner.core.workload import Workload
from tuner.predict.implementation import implementation_of

MESSAGE_STATES: Final = 4
"""Hidden states of one micro-batch that the messages of a pipeline without interleaving hold at most: input and
gradient received, output and gradient sent. Counted in Megatron-Core's schedules.py."""
_RECOMPUTE: Final = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
"""The knobs of recompute, which are compared together."""
_IN_FLIGHT: Final = ("tp", "pp", "vpp", "cp", "micro_batch_size", "microbatch_group_size_per_vp_stage")
"""The knobs that decide how many micro-batches are in flight."""


def needs_at_least_as_much_memory(
    table: pd.DataFrame, layout: Layout, workload: Workload, cluster: Cluster
) -> Bools:
    """Return which rows provably need no less memory than `layout`; shape [rows]. A row equal to `layout` is among
    them.

    A row qualifies if each of the following knobs is equal to the layout's or differs in the stated direction, and all
    other knobs are equal. Every tensor at the layout's peak then has a counterpart at least as large in the row.

    - micro_batch_size is larger: min(pp, M) micro-batches of gbs/(dp*M) samples are in flight, which never shrinks as M
      falls. Plain Torch also keeps tensors of a fixed size per micro-batch (see `_fills_the_pipeline`).
    - recompute is off, if the layout has enough layers per stage (see `_may_drop_recompute`).
    - use_distributed_optimizer is off, on CUDA: each rank then holds the whole state instead of a shard. On CPU the
      knob must be equal: Gloo copies the gradients that it scatters, and the copy may outweigh the shards.
    - nccl_nvls_enable is on: NCCL then takes its buffers in addition to everything else.
    - cpu_offloading_num_layers is 0: the activations of every layer then stay. Two counts above 0 are not compared,
      since their layers leave at different moments.
    - pp is smaller: fewer stages hold more layers each, if `_merges_stages` proves it.

    Other knobs must be equal even if the direction is almost sure. FSDP gathers and scatters through buffers that the
    weights of a small model do not outweigh. CUDA graphs and registered buffers have memory of their own kind.
    Expandable segments usually reserve less memory, but this is not proven.
    """
    mask = _differs_upwards(table, layout, _may_drop_recompute(layout, workload, cluster))
    if cluster.device == "cpu":
        mask &= table["use_distributed_optimizer"].to_numpy() == layout.use_distributed_optimizer
    if implementation_of(cluster) == "torch":
        larger = table["micro_batch_size"].to_numpy() > layout.micro_batch_size
        mask &= ~larger | _fills_the_pipeline(table, workload, cluster)
    mask &= (table["pp"].to_numpy() == layout.pp) | _merges_stages(table, layout, workload, cluster)
    return mask


def _differs_upwards(table: pd.DataFrame, layout: Layout, may_drop_recompute: bool) -> Bools:
    """Return the rows in which every knob but pp is equal to the layout's or differs in the stated direction."""
    mask: Bools = np.ones(len(table), dtype=bool)
    same_or_no_recompute = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        equal = _equal(table, knob, getattr(layout, knob))
        if knob == "micro_batch_size":
            mask &= table[knob].to_numpy() >= layout.micro_batch_size
        elif knob == "use_distributed_optimizer":
            mask &= equal | ~table[knob].to_numpy(dtype=bool)
        elif knob == "nccl_nvls_enable":
            mask &= equal | table[knob].to_numpy(dtype=bool)
        elif knob == "cpu_offloading_num_layers":
            mask &= equal | _equal(table, knob, 0)
        elif knob in _RECOMPUTE:
            same_or_no_recompute &= equal
        elif knob != "pp":
            mask &= equal
    if may_drop_recompute:
        same_or_no_recompute |= _equal(table, "recompute_granularity", "none")
    return mask & same_or_no_recompute


def _equal(table: pd.DataFrame, knob: str, value: object) -> Bools:
    """Return the rows in which `knob` has the value `value`, as a mask of shape [rows].

    A categorical column is compared by its codes instead of its texts.
    """
    column = table[knob]
    values = column.array if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy()
    return np.asarray(values == value, dtype=np.bool_)


def _fills_the_pipeline(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Bools:
    """Return the rows that have as many micro-batches as the pipeline can hold in flight, as a mask of shape [rows].

    Torch's attention keeps rotary tables and masks for each micro-batch, whose size does not depend on the number of
    samples in it. If the micro-batches do not fill the pipeline, a layout with larger and therefore fewer micro-batches
    keeps fewer of these tables.
    """
    c = Columns.of(table[[*_IN_FLIGHT]])
    dp = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"])
    stated_group = c["microbatch_group_size_per_vp_stage"]
    microbatch_group = np.where(stated_group > 0, stated_group, c["pp"])
    # An interleaved schedule has at most 2 * (pp - 1) + (vpp - 1) * group + 2 of its num_microbatches * vpp chunk
    # passes in flight.
    most_in_flight = c["pp"] + np.where(c["vpp"] > 1, microbatch_group, 0)
    return num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp) >= most_in_flight


def _may_drop_recompute(layout: Layout, workload: Workload, cluster: Cluster) -> bool:
    """Return whether a stage provably keeps no less without any recompute than with the layout's recompute.

    Two kinds of recompute are not compared with each other. While layers are recomputed, a stage holds what these
    layers keep, and besides that their inputs and the output that is made again: at most four hidden states per layer.
    A layer keeps more than four: its input, the norm's output, the sum, the second norm's output, and all between. So a
    stage with at least twice as many layers as are recomputed at once keeps more without recompute.

    Torch's context-parallel attention is an exception: recomputed, it keeps its input instead of the gathered keys and
    values, which may be more.
    """
    torch = implementation_of(cluster) == "torch"
    if torch and layout.recompute_granularity == "selective" and layout.cp > 1:
        return False
    recomputed_at_once = layout.recompute_num_layers if layout.recompute_method == "uniform" else 1
    return _fewest_layers(layout, workload) >= 2 * recomputed_at_once


def _fewest_layers(layout: Layout, workload: Workload) -> int:
    """Return a lower bound of the layers on the pipeline rank that has the fewest."""
    if layout.pipeline_model_parallel_layout != "none":
        layers = decoders(layout.pipeline_model_parallel_layout).reshape(-1, layout.pp)
        return int(layers.sum(axis=0).min())
    slots = stage_slots(Columns.single(layout), workload)
    accounts = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    return int(min(part[0] for part in (slots if layout.pp > 2 else (slots.first, slots.last)))) - accounts


def _merges_stages(table: pd.DataFrame, layout: Layout, workload: Workload, cluster: Cluster) -> Bools:
    """Return the rows whose stages are k merged stages of the layout, and that provably keep no less.

    The proof is for 1F1B over layers that are all alike. The layout has n layers per stage and M micro-batches of b
    samples; its stage s keeps min(pp - s, M) * b samples of n layers. World size and global batch are given, so the
    merged layout has pp/k stages of k*n layers, k*dp data-parallel ranks, and b' >= b samples per micro-batch with M' *
    b' = M * b / k. Stage s lies in the merged stage s' = s // k, so that pp - s <= k * (pp/k - s'). The merged stage
    keeps min(pp/k - s', M') * b' samples of k*n layers, which is no less.

    One of these steps fails for virtual pipeline chunks, for uneven and written-out splits, for experts (whose tokens
    follow the routing), for checkpoints of several layers, for multi-token prediction, and for FSDP (whose shards
    shrink as dp grows). `_added_bytes` and `_taken_bytes` compare what merging adds to a stage and takes from it
    besides activations.
    """
    model, pp = workload.model, table["pp"].to_numpy()
    uneven = (
        layout.num_layers_in_first_pipeline_stage
        or layout.num_layers_in_last_pipeline_stage
        or layout.account_for_embedding_in_pipeline_split
        or layout.account_for_loss_in_pipeline_split
        or layout.pipeline_model_parallel_layout != "none"
    )
    layers_alike = not model.is_moe and model.window_attn_skip_freq is None and not model.mtp_num_layers
    if layout.vpp > 1 or uneven or layout.use_megatron_fsdp or not layers_alike:
        return np.zeros(len(table), dtype=np.bool_)
    merged: Bools = (pp < layout.pp) & (layout.pp % pp == 0)
    if layout.recompute_granularity == "full" and (
        layout.recompute_method != "uniform" or layout.recompute_num_layers > 1
    ):
        merged &= _equal(table, "recompute_granularity", "none")
    if cluster.device == "cuda":
        merged &= pp > 1  # Without a pipeline NCCL has no buffers for its messages.
    distributed = table["use_distributed_optimizer"].to_numpy()
    merged &= _added_bytes(pp, layout, workload) >= _taken_bytes(distributed, layout, workload, cluster)
    return merged


def _added_bytes(pp: Ints, layout: Layout, workload: Workload) -> Floats:
    """Return the bytes of weights and gradients of the layers that a stage gains when only `pp` stages are left."""
    model = workload.model
    sharded = attention(model).sharded + dense_mlp(model).sharded
    replicated = attention(model).replicated + dense_mlp(model).replicated + 2 * norm(model)
    layer_parameters = sharded / layout.tp + replicated
    gained_layers: Floats = model.num_layers / pp - model.num_layers / layout.pp
    return gained_layers * layer_parameters * (workload.weight_bytes + workload.gradient_bytes)


def _taken_bytes(distributed: Bools, layout: Layout, workload: Workload, cluster: Cluster) -> Floats:
    """Return an upper bound of the bytes that merging takes from the peak of a stage.

    Merging removes the messages between stages that become one stage. It removes the gradient of the embedding, which
    is made at a time when the merged stage has freed more layers. With a distributed optimizer it removes a part of the
    shard of the vocabulary's state, since this shard shrinks as dp grows. The shards of the layers keep their size,
    since k times the layers are split over k times the ranks.
    """
    model, tp = workload.model, layout.tp
    weight_bytes = workload.weight_bytes
    learned = model.position_embedding_type == "learned_absolute"
    table_rows = model.padded_vocab_size(tp) / tp + (model.max_position_embeddings if learned else 0)
    dp = data_parallel_size(cluster.world_size, tp, layout.pp, layout.cp)
    shard_bytes = np.where(distributed, workload.adam_bytes / (dp * layout.cp), 0)
    embedding_parameters = table_rows * model.hidden_size + norm(model)
    embedding_bytes: Floats = embedding_parameters * (weight_bytes + shard_bytes)
    tokens = workload.seq_length * layout.micro_batch_size / layout.cp / (tp if layout.sp else 1)
    return embedding_bytes + MESSAGE_STATES * tokens * model.hidden_size * weight_bytes
