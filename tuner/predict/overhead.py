"""What a GPU holds beyond allocated tensors: CUDA's context, NCCL's buffers, blocks that the allocator cannot use.

Prior values, from what others measured; a sweep corrects them by which of its trials fit (tuner/search/feasibility.py).
On CPU there is nothing of the kind: the program accounts tensors, and the limit is theirs.
"""

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.cluster import Cluster
from tuner.layout import data_parallel_size, expert_data_parallel_size
from tuner.rules.base import Columns
from tuner.workload import Model, Workload

Floats = NDArray[np.float64]

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
UNCERTAINTY: Final = 0.5
"""Relative deviation of all of it: the measurements above differ by as much."""


def beyond_allocated_gib(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> Floats:
    """GiB that a GPU holds beside its allocator's memory, a value a row of a table of valid layouts; 0 on CPU."""
    if cluster.device == "cpu":
        return np.zeros(len(table))
    columns = Columns.of(table)
    peers = np.minimum(np.minimum(columns["ep"], cluster.nvlink_domain_gpus) - 1, MOST_PEERS)
    counts = communicators(columns, workload.model, cluster)
    return np.asarray(CONTEXT_GIB + COMMUNICATOR_GIB * counts + PEER_GIB * peers, dtype=np.float64)


def reserved_ratio(cluster: Cluster) -> float:
    """Memory that the allocator takes over what it hands out; 1 on CPU."""
    return 1.0 if cluster.device == "cpu" else RESERVED_RATIO


def communicators(c: Columns, model: Model, cluster: Cluster) -> NDArray[np.int64]:
    """Process groups of more than one rank over which a rank communicates in a step; each has a communicator.

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
    counts: NDArray[np.int64] = np.sum([size > 1 for size in sizes], axis=0)
    return counts
