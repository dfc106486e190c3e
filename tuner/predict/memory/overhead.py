"""Memory of a GPU beyond allocated tensors: CUDA's context, NCCL's buffers, and blocks that the allocator cannot use.

The constants are prior values, from figures that others measured. A sweep corrects the prediction by its own trials
(tuner/predict/feasibility.py). On CPU there is nothing beyond tensors: the program counts tensors, and the limit is on
their sum.
"""

from typing import Final

import numpy as np
import pandas as pd

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Floats, Ints
from tuner.core.layout import data_parallel_size, expert_data_parallel_size
from tuner.core.workload import Model, Workload
from tuner.predict import nccl
from tuner.predict.memory.peak import GIB

CONTEXT_GIB: Final = 0.6
"""GiB of CUDA's context with the kernels of Torch, cuBLAS, cuDNN and Transformer Engine loaded. Assumed, below the
published 1.06 GB of an H100 with a first communicator (github.com/NVIDIA/nccl/issues/1685)."""
COMMUNICATOR_GIB: Final = 1.0
"""GiB of the buffers of all channels of one NCCL communicator after it has communicated. Assumed, within published
figures: 0.53 to 0.67 GiB on four A100 (github.com/NVIDIA/nccl/issues/964); 1.6 GB for one communicator and 6 GB for
three or more (github.com/NVIDIA/nccl/issues/864); 7 GB for all communicators of one rank in Megatron with tp 2, pp 2,
dp 2 on eight H100, and 9.5 GB with experts (github.com/verl-project/verl/pull/6408)."""
PEER_GIB: Final = 0.44
"""GiB of the buffers that an all-to-all adds per peer over NVLink. Published: 3.3 GB for seven peers of an H100, with
32 channels of 12 MiB each (github.com/NVIDIA/nccl/issues/1685)."""
MOST_PEERS: Final = 7
"""Largest number of peers of an all-to-all that add buffers of their own. Published: the largest number that was
measured for PEER_GIB. Peers over the network share their buffers."""
RESERVED_RATIO: Final = 1.04
"""Memory that the caching allocator reserves, as a multiple of the allocated memory: blocks do not fit exactly.
Assumed, above a published figure: 1.83 GiB beside 75.3 GiB when a Llama-3-70B ran out of memory
(github.com/vllm-project/compressed-tensors/pull/587); the ratio is larger if shapes vary. Blocks that are reserved only
for speed do not count, since the allocator frees them before it fails."""
EXPANDABLE_RATIO: Final = 1.01
"""Memory that the allocator reserves, as a multiple of the allocated memory, if segments grow in place. Assumed: the
end of a 2 MiB page per segment is unused (PyTorch's notes on CUDA semantics, expandable_segments)."""
USERBUFFERS: Final = 10
"""Number of buffers that Transformer Engine registers for the overlap of tensor parallel communication, each as large
as the hidden state of a whole tensor parallel group. Published: one each for 4 rings, 2 pipelines and 4 bulk
collectives (module/base.py, initialize_ub)."""
DEEPEP_CHANNELS: Final = 10
"""Number of channels of DeepEP. Published: half of the 20 multiprocessors that Megatron assigns to DeepEP
(moe_deepep_num_sms)."""
DEEPEP_PEERS: Final = 8
"""Largest number of ranks that DeepEP reaches over NVLink. Published: csrc/kernels/configs.cuh, NUM_MAX_NVL_PEERS."""
DEEPEP_NVLINK_TOKENS: Final = 256
"""Tokens for which a channel of DeepEP has room per peer over NVLink. Published: csrc/config.hpp,
get_nvl_buffer_size_hint; deep_ep/buffer.py, get_dispatch_config."""
DEEPEP_NETWORK_TOKENS: Final = 2 * 128
"""Tokens for which a channel of DeepEP has room per peer over the network, in both directions together. Published:
csrc/config.hpp, get_rdma_buffer_size_hint; deep_ep/buffer.py, get_dispatch_config."""
UNCERTAINTY: Final = 0.5
"""Prior standard deviation of the memory outside the allocator, as a share of this memory. Assumed: the published
figures above differ by as much."""


def beyond_allocated_gib(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Floats:
    """Return the GiB of a GPU's memory that a rank uses outside PyTorch's allocator, one value per row; 0 on CPU."""
    if cluster.device == "cpu":
        return np.zeros(len(table))
    columns = Columns.of(table)
    peers = np.minimum(np.minimum(columns["ep"], cluster.nvlink_domain_gpus) - 1, MOST_PEERS)
    groups = group_sizes(columns, workload.model, cluster)
    communicators = np.sum([size > 1 for size in groups], axis=0)
    total_gib = CONTEXT_GIB + COMMUNICATOR_GIB * communicators + PEER_GIB * peers
    # The figures for communicators include the buffers of NVLS.
    nvls_is_off = ~columns.on("nccl_nvls_enable")
    if nvls_is_off.any():
        nvls_bytes = sum(nccl.switch_bytes(size, cluster) for size in groups)
        total_gib -= np.where(nvls_is_off, nvls_bytes, 0.0) / GIB
    return np.asarray(total_gib + _registered_bytes(columns, workload) / GIB, dtype=np.float64)


def _registered_bytes(c: Columns, workload: Workload) -> Floats:
    """Return the bytes of the buffers that communication registers outside the allocator; shape [rows].

    They belong to Transformer Engine's overlap of tensor parallel communication, and to the flex dispatcher.
    """
    tokens = workload.seq_length * c["micro_batch_size"] / c["cp"]
    overlap = USERBUFFERS * tokens * workload.model.hidden_size * workload.weight_bytes
    total = np.where(c.on("tp_comm_overlap"), overlap, 0.0)
    flex = c.among("moe_token_dispatcher_type", "flex")
    if flex.any():
        deepep = c.among("moe_flex_dispatcher_backend", "deepep")
        total += np.where(
            flex, np.where(deepep, _deepep_bytes(c, workload), _hybridep_bytes(c, workload)), 0.0
        )
    return total


def _deepep_bytes(c: Columns, workload: Workload) -> Floats:
    """Return the bytes of DeepEP's buffers on a rank, which store tokens in 16 bits; shape [rows]."""
    ranks = c["ep"] * c["etp"]
    near, far = np.minimum(ranks, DEEPEP_PEERS), np.maximum(ranks // DEEPEP_PEERS, 1)
    tokens = near * DEEPEP_NVLINK_TOKENS + np.where(far > 1, far * DEEPEP_NETWORK_TOKENS, 0)
    buffers: Floats = DEEPEP_CHANNELS * tokens * workload.model.hidden_size * 2
    return buffers


def _hybridep_bytes(c: Columns, workload: Workload) -> Floats:
    """Return the bytes of HybridEP's buffer on a rank, which serves both directions; shape [rows].

    It has room for every token of the ep * etp ranks, with one fp32 probability per expert for each token
    (csrc/hybrid_ep, allocate_dispatch_buffers).
    """
    model, ranks = workload.model, c["ep"] * c["etp"]
    tokens = workload.seq_length * c["micro_batch_size"] / c["cp"] / np.where(c.on("sp"), c["tp"], 1)
    token_bytes = model.hidden_size * workload.weight_bytes + 4 * (model.num_moe_experts or 0)
    buffer: Floats = tokens * ranks * token_bytes
    return buffer


def reserved_ratio(table: pd.DataFrame, cluster: Cluster) -> Floats:
    """Return the memory that the allocator reserves as a multiple of the allocated memory; shape [rows], 1 on CPU."""
    if cluster.device == "cpu":
        return np.ones(len(table))
    return np.where(table["expandable_segments"].to_numpy(dtype=bool), EXPANDABLE_RATIO, RESERVED_RATIO)


def group_sizes(c: Columns, model: Model, cluster: Cluster) -> list[Ints]:
    """Return the sizes of all process groups in which a rank communicates in a step: one array [rows] per group.

    A group of several ranks has an NCCL communicator. Two groups contain the whole world: the default group, and the
    group of the optimizer, which sums up the norm of the gradients (megatron/core/parallel_state.py,
    intra_distributed_optimizer_instance_group). In layers with experts, the ep * etp ranks exchange their numbers of
    tokens in a group of their own.
    """
    world, ep, etp = cluster.world_size, c["ep"], c["etp"]
    data = data_parallel_size(world, c["tp"], c["pp"], c["cp"]) * c["cp"]
    sizes = [np.full_like(ep, world), np.full_like(ep, world), c["tp"], c["pp"], c["cp"], data]
    # If the first and the last stage both have the embedding, they reduce its gradient in a group of their own.
    if model.share_embeddings_and_output_weights or model.mtp_num_layers:
        sizes.append(c["pp"])
    if model.is_moe:
        # With ep 1, the gradients of experts are reduced with the dense ones.
        experts = np.where(ep > 1, expert_data_parallel_size(world, c["pp"], ep, etp), 1)
        sizes += [ep, etp, ep * etp, experts]
    return sizes
