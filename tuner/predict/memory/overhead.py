"""What a GPU holds beyond allocated tensors: CUDA's context, NCCL's buffers, blocks that the allocator cannot use.

Prior values, from what others measured; a sweep corrects them by the trials that fit (tuner/predict/feasibility.py).
On CPU there is nothing of the kind: the program accounts tensors, and the limit is theirs.
"""

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import data_parallel_size, expert_data_parallel_size
from tuner.core.workload import Model, Workload
from tuner.predict import nccl

Floats = NDArray[np.float64]
GIB: Final = 1024**3

CONTEXT_GIB: Final = 0.6
"""CUDA's context with the kernels of Torch, cuBLAS, cuDNN and Transformer Engine loaded; with a first communicator on
an H100 it was 1.06 GB (github.com/NVIDIA/nccl/issues/1685)."""
COMMUNICATOR_GIB: Final = 1.0
"""One NCCL communicator once it communicated, its buffers of every channel. Measured: 0.53 to 0.67 on four A100
(github.com/NVIDIA/nccl/issues/964), 1.6 for one and 6 for three and more (issue 864 there), 7 for tp 2, pp 2, dp 2 of
Megatron on eight H100, 9.5 with experts (github.com/verl-project/verl/pull/6408)."""
PEER_GIB: Final = 0.44
"""What an all-to-all adds for each peer over NVLink: 3.3 GB for seven peers of an H100, 32 channels of 12 MiB each
(github.com/NVIDIA/nccl/issues/1685)."""
MOST_PEERS: Final = 7
"""As many were measured; peers over the network share their buffers."""
RESERVED_RATIO: Final = 1.04
"""Memory that the caching allocator needs over what is allocated, since blocks do not fit each other exactly: 1.83 GiB
beside 75.3 where a Llama-3-70B ran out of memory (github.com/vllm-project/compressed-tensors/pull/587), more where
shapes vary. Blocks kept for speed alone do not count: the allocator gives them back before it gives up."""
EXPANDABLE_RATIO: Final = 1.01
"""The same where segments grow in place: what is left is the end of a 2 MiB page in each (PyTorch's notes on CUDA
semantics: expandable_segments). Layouts that fail by fragmentation without are known to pass with it."""
USERBUFFERS: Final = 10
"""Hidden states of a tensor parallel group, whole, that Transformer Engine registers for its overlap: one each for 4
rings, 2 pipelines and 4 bulk collectives (module/base.py, initialize_ub)."""
DEEPEP_CHANNELS: Final = 10
"""Half of the 20 multiprocessors that Megatron lets DeepEP take (moe_deepep_num_sms)."""
DEEPEP_PEERS: Final = 8
"""Ranks that DeepEP reaches over NVLink (csrc/kernels/configs.cuh, NUM_MAX_NVL_PEERS)."""
DEEPEP_TOKENS: Final = (256, 2 * 128)
"""Tokens that a channel's buffer holds for each peer over NVLink, and for each peer over the network, both ways
(csrc/config.hpp, get_nvl_buffer_size_hint and get_rdma_buffer_size_hint; deep_ep/buffer.py, get_dispatch_config)."""
UNCERTAINTY: Final = 0.5
"""Relative deviation of all of it: the measurements above differ by as much."""


def beyond_allocated_gib(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Floats:
    """GiB that a GPU holds beside its allocator's memory, a value a row of a table of valid layouts; 0 on CPU."""
    if cluster.device == "cpu":
        return np.zeros(len(table))
    columns = Columns.of(table)
    peers = np.minimum(np.minimum(columns["ep"], cluster.nvlink_domain_gpus) - 1, MOST_PEERS)
    groups = group_sizes(columns, workload.model, cluster)
    counts = np.sum([size > 1 for size in groups], axis=0)
    total = CONTEXT_GIB + COMMUNICATOR_GIB * counts + PEER_GIB * peers
    # The communicators were measured with what NVLS takes.
    off = ~columns.on("nccl_nvls_enable")
    if off.any():
        total -= np.where(off, sum(nccl.switch_bytes(size, cluster) for size in groups), 0.0) / GIB
    return np.asarray(total + _registered_bytes(columns, workload) / GIB, dtype=np.float64)


def _registered_bytes(c: Columns, workload: Workload) -> Floats:
    """Buffers outside the allocator: those of tensor parallel overlap, and of the dispatchers of experts.

    HybridEP takes every token of an expert group at its largest, with a probability for each expert (csrc/hybrid_ep:
    allocate_dispatch_buffers), one buffer for both ways.
    """
    model, state = workload.model, 4 if workload.precision == "fp32" else 2
    tokens = workload.seq_length * c["micro_batch_size"] / c["cp"]
    total = np.where(c.on("tp_comm_overlap"), USERBUFFERS * tokens * model.hidden_size * state, 0.0)
    flex = c.among("moe_token_dispatcher_type", "flex")
    if flex.any():
        ranks = c["ep"] * c["etp"]
        near, far = np.minimum(ranks, DEEPEP_PEERS), np.maximum(ranks // DEEPEP_PEERS, 1)
        held = near * DEEPEP_TOKENS[0] + np.where(far > 1, far * DEEPEP_TOKENS[1], 0)
        deepep = DEEPEP_CHANNELS * held * model.hidden_size * 2
        own = tokens / np.where(c.on("sp"), c["tp"], 1)
        hybridep = own * ranks * (model.hidden_size * state + 4 * (model.num_moe_experts or 0))
        backend = c.among("moe_flex_dispatcher_backend", "deepep")
        total += np.where(flex, np.where(backend, deepep, hybridep), 0.0)
    return total


def reserved_ratio(table: pd.DataFrame, cluster: Cluster) -> Floats:
    """Memory that the allocator takes over what it hands out, a value a row; 1 on CPU."""
    if cluster.device == "cpu":
        return np.ones(len(table))
    return np.where(table["expandable_segments"].to_numpy(dtype=bool), EXPANDABLE_RATIO, RESERVED_RATIO)


def group_sizes(c: Columns, model: Model, cluster: Cluster) -> list[NDArray[np.int64]]:
    """Sizes of the process groups over which a rank communicates in a step; those of several ranks have a
    communicator.

    The world's are two: the default group, and that of the optimizer, which sums up the norm of the gradients
    (megatron/core/parallel_state.py: intra_distributed_optimizer_instance_group). Expert ranks count tokens over
    tp and ep together.
    """
    world, ep, etp = cluster.world_size, c["ep"], c["etp"]
    data = data_parallel_size(world, c["tp"], c["pp"], c["cp"]) * c["cp"]
    sizes = [np.full_like(ep, world), np.full_like(ep, world), c["tp"], c["pp"], c["cp"], data]
    # Ends of the pipeline that share the embedding's weights reduce its gradient.
    if model.share_embeddings_and_output_weights or model.mtp_num_layers:
        sizes.append(c["pp"])
    if model.is_moe:
        # With ep 1 the experts' gradients go with the dense ones.
        experts = np.where(ep > 1, expert_data_parallel_size(world, c["pp"], ep, etp), 1)
        sizes += [ep, etp, ep * etp, experts]
    return sizes
