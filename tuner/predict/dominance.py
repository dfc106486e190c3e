"""Which rows provably need at least as much memory as a given layout.

If that layout ran out of memory, these rows are pruned without running them.
"""

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
"""Largest number of hidden states of one micro-batch that a stage holds for messages to its neighbours, in a pipeline
without interleaving: the received input and gradient, and the sent output and gradient. Counted in Megatron-Core's
schedules.py."""
_RECOMPUTE: Final = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
"""The knobs of recomputation. They are compared together: a row qualifies if all of them are equal to the layout's, or
if its recomputation is off."""


def needs_at_least_as_much_memory(
    table: pd.DataFrame, layout: Layout, workload: Workload, cluster: Cluster
) -> Bools:
    """Return a mask of the rows of `table` that provably need at least as much memory as `layout`; shape [rows].

    A row qualifies if each of the following knobs is equal to the layout's or differs in the stated direction, and all
    other knobs are equal. Every tensor at the layout's peak then has a counterpart at least as large in the row. A row
    equal to `layout` qualifies too.

    - micro_batch_size is larger: of M micro-batches with gbs/(dp*M) samples each, min(pp, M) are in flight, and the
      samples in flight never become fewer as M falls. Plain Torch also saves tensors of a fixed size per micro-batch
      (see `_fills_the_pipeline`).
    - recompute_granularity is none, if the layout has enough layers per stage (see `_may_drop_recompute`).
    - use_distributed_optimizer is off, on CUDA: each rank then holds the whole optimizer state instead of a shard. On
      CPU this knob must be equal: Gloo copies the gradients that it scatters, and the copy may be larger than what
      sharding saves.
    - nccl_nvls_enable is on: NCCL then allocates buffers for NVLS in addition to everything else.
    - cpu_offloading_num_layers is 0: the activations of every layer then stay on the GPU. Two counts above 0 are not
      compared, since the activations are offloaded at different moments.
    - pp is smaller: each of the fewer stages has more layers. `_merges_stages` returns the rows in which this is
      proven.

    All other knobs must be equal, even those for which one value almost always needs more memory. Megatron-FSDP needs
    buffers to gather and scatter in, which may be larger than what it saves on a small model. CUDA graphs and
    registered buffers have memory of their own kind. Expandable segments usually reserve less memory, but this is not
    proven.
    """
    return dominating(Columns.of(table), layout, workload, cluster)


def dominating(columns: Columns, layout: Layout, workload: Workload, cluster: Cluster) -> Bools:
    """Return what `needs_at_least_as_much_memory` returns of the table that these columns were made of.

    To make columns of a table takes longer than to compare them with a layout.
    """
    mask = _differs_upwards(columns, layout, _may_drop_recompute(layout, workload, cluster))
    if cluster.device == "cpu":
        mask &= columns.on("use_distributed_optimizer") == layout.use_distributed_optimizer
    if implementation_of(cluster) != "transformer_engine":
        larger = columns["micro_batch_size"] > layout.micro_batch_size
        mask &= ~larger | _fills_the_pipeline(columns, workload, cluster)
    mask &= (columns["pp"] == layout.pp) | _merges_stages(columns, layout, workload, cluster)
    return mask


def _differs_upwards(columns: Columns, layout: Layout, may_drop_recompute: bool) -> Bools:
    """Return a mask of the rows in which every knob but pp allows at least as much memory; shape [rows].

    Each knob must be equal to the layout's or differ in the direction that `needs_at_least_as_much_memory` states.
    `may_drop_recompute` says whether a row without recomputation qualifies, too.
    """
    mask: Bools = np.ones(len(columns["pp"]), dtype=bool)
    same_or_no_recompute = mask.copy()
    for knob in KNOBS:
        equal = _equal(columns, knob, getattr(layout, knob))
        if knob == "micro_batch_size":
            mask &= columns[knob] >= layout.micro_batch_size
        elif knob == "use_distributed_optimizer":
            mask &= equal | ~columns.on(knob)
        elif knob == "nccl_nvls_enable":
            mask &= equal | columns.on(knob)
        elif knob == "cpu_offloading_num_layers":
            mask &= equal | _equal(columns, knob, 0)
        elif knob in _RECOMPUTE:
            same_or_no_recompute &= equal
        elif knob != "pp":
            mask &= equal
    if may_drop_recompute:
        same_or_no_recompute |= _equal(columns, "recompute_granularity", "none")
    return mask & same_or_no_recompute


def _equal(columns: Columns, knob: str, value: object) -> Bools:
    """Return a mask of the rows in which `knob` has the value `value`; shape [rows]."""
    if isinstance(value, str):
        return columns.among(knob, value)
    return np.asarray(columns.column(knob) == value, dtype=np.bool_)


def _fills_the_pipeline(c: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows with at least as many micro-batches as the pipeline can have in flight; shape [rows].

    With plain Torch, attention saves rotary tables and masks for each micro-batch in flight. Their size does not depend
    on the number of samples in the micro-batch. If a row has fewer micro-batches than the pipeline can have in flight,
    it saves fewer of these tables than a layout with smaller and therefore more micro-batches.
    """
    dp = data_parallel_size(cluster.world_size, c["tp"], c["pp"], c["cp"])
    stated_group = c["microbatch_group_size_per_vp_stage"]
    microbatch_group = np.where(stated_group > 0, stated_group, c["pp"])
    # An interleaved schedule has at most 2 * (pp - 1) + (vpp - 1) * microbatch_group + 2 of its
    # num_microbatches * vpp passes through chunks in flight.
    most_in_flight = c["pp"] + np.where(c["vpp"] > 1, microbatch_group, 0)
    return num_microbatches(workload.global_batch_size, c["micro_batch_size"], dp) >= most_in_flight


def _may_drop_recompute(layout: Layout, workload: Workload, cluster: Cluster) -> bool:
    """Return whether a stage of the layout provably needs no more memory than the same stage without recomputation.

    Two kinds of recomputation are not compared with each other. While some layers are recomputed, a stage holds their
    activations, and in addition the inputs of recomputed layers and the outputs that are computed again: at most four
    hidden states per layer. The activations of one layer are more than four hidden states: its input, the first norm's
    output, the residual sum, the second norm's output, and all between. So a stage with at least twice as many layers
    as are recomputed at once needs more memory without recomputation.

    Plain Torch's context-parallel attention is an exception. With recomputation it saves its input, which may be larger
    than the gathered keys and values that it saves without recomputation.
    """
    torch = implementation_of(cluster) != "transformer_engine"
    if torch and layout.recompute_granularity == "selective" and layout.cp > 1:
        return False
    recomputed_at_once = layout.recompute_num_layers if layout.recompute_method == "uniform" else 1
    return _fewest_layers(layout, workload) >= 2 * recomputed_at_once


def _fewest_layers(layout: Layout, workload: Workload) -> int:
    """Return a lower bound of the number of layers on the pipeline rank that has the fewest layers."""
    if layout.pipeline_model_parallel_layout != "none":
        layers = decoders(layout.pipeline_model_parallel_layout).reshape(-1, layout.pp)
        return int(layers.sum(axis=0).min())
    slots = stage_slots(Columns.single(layout), workload)
    accounts = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    return int(min(part[0] for part in (slots if layout.pp > 2 else (slots.first, slots.last)))) - accounts


def _merges_stages(columns: Columns, layout: Layout, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows whose fewer pipeline stages provably need at least as much memory; shape [rows].

    Each stage of such a row consists of k = layout.pp / pp successive stages of the layout. The proof is for 1F1B over
    layers that are all alike. The layout has n layers per stage and M micro-batches of b samples; its stage s saves the
    activations of min(layout.pp - s, M) * b samples in n layers. World size and global batch size are fixed, so the row
    has layout.pp/k stages of k*n layers, k*dp data-parallel ranks, and M' micro-batches of b' >= b samples with M'*b' =
    M*b/k. Stage s lies in the merged stage s' = s // k, so that layout.pp - s <= k * (layout.pp/k - s'). The merged
    stage saves the activations of min(layout.pp/k - s', M') * b' samples in k*n layers, which are no less.

    One of these steps fails for virtual pipeline chunks, for uneven splits and those that
    `pipeline_model_parallel_layout` writes out, for experts (whose tokens follow the routing), for checkpoints of
    several layers, for multi-token prediction, and for Megatron-FSDP (whose shards shrink as dp grows). Besides
    activations, merging must add at least as many bytes to a stage (`_added_bytes`) as it takes from it
    (`_taken_bytes`).
    """
    model, pp = workload.model, columns["pp"]
    uneven = (
        layout.num_layers_in_first_pipeline_stage
        or layout.num_layers_in_last_pipeline_stage
        or layout.account_for_embedding_in_pipeline_split
        or layout.account_for_loss_in_pipeline_split
        or layout.pipeline_model_parallel_layout != "none"
    )
    layers_alike = not model.is_moe and model.window_attn_skip_freq is None and not model.mtp_num_layers
    if layout.vpp > 1 or uneven or layout.use_megatron_fsdp or not layers_alike:
        return np.zeros(len(pp), dtype=np.bool_)
    merged: Bools = (pp < layout.pp) & (layout.pp % pp == 0)
    if layout.recompute_granularity == "full" and (
        layout.recompute_method != "uniform" or layout.recompute_num_layers > 1
    ):
        merged &= _equal(columns, "recompute_granularity", "none")
    if cluster.device == "cuda":
        merged &= pp > 1  # Without a pipeline NCCL has no buffers for its messages.
    distributed = columns.on("use_distributed_optimizer")
    merged &= _added_bytes(pp, layout, workload) >= _taken_bytes(distributed, layout, workload, cluster)
    return merged


def _added_bytes(pp: Ints, layout: Layout, workload: Workload) -> Floats:
    """Return the bytes of weights and gradients that a stage gains with its additional layers; shape [rows].

    A stage gains layers if the model is split into `pp` stages, one value per row, instead of `layout.pp`.
    """
    model = workload.model
    sharded = attention(model).sharded + dense_mlp(model).sharded
    replicated = attention(model).replicated + dense_mlp(model).replicated + 2 * norm(model)
    layer_parameters = sharded / layout.tp + replicated
    gained_layers: Floats = model.num_layers / pp - model.num_layers / layout.pp
    return gained_layers * layer_parameters * (workload.weight_bytes + workload.gradient_bytes)


def _taken_bytes(distributed: Bools, layout: Layout, workload: Workload, cluster: Cluster) -> Floats:
    """Return an upper bound of the bytes, activations aside, by which merging lowers a stage's peak; shape [rows].

    `distributed` says which rows use the distributed optimizer. Merging removes the messages between stages that become
    one stage. It removes the gradient of the embedding from the peak, since a merged stage has freed more layers when
    this gradient is computed. With a distributed optimizer it removes a part of the embedding's optimizer state, since
    its shard shrinks as dp grows. The shards of the layers keep their size, since k times the layers are split over k
    times the ranks.
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
