"""Two options of NCCL: reductions inside NVLink's switches (NVLS), and buffers that are registered with NCCL."""

from typing import Final

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Floats, Ints
from tuner.predict.time.collectives import NVLINK_EFFICIENCY, ProcessGroups

SWITCH_SPEEDUP: Final = 480 / 370
"""Bus bandwidth of an all-reduce with NVLS, over its bus bandwidth without NVLS. Published: 480 and 370 GB/s on 8 H100
(S. Jeaugey, NCCL's author, in github.com/NVIDIA/nccl-tests/issues/212)."""
REGISTERED_EFFICIENCY: Final = 370 / 450
"""Share of NVLink's rate that NCCL reaches at any size if it need not copy through buffers of its own; the protocol
takes the rest. Published: 370 of 450 GB/s (github.com/NVIDIA/nccl-tests/issues/212)."""
SWITCHED_FROM_GB_PER_S: Final = 450
"""NVLink's rate from which its switches can reduce, in GB/s per direction. Published: the rate of NVLink's fourth
generation, in Hopper."""
NVLS_CHANNEL_BYTES: Final = 2 * 8 * 128 * 1024
"""Bytes of the buffers of one channel and head: both directions, 8 steps of 128 KiB. Published: NCCL,
src/transport/nvls.cc, ncclNvlsBufferSetup."""
NVLS_CHANNELS: Final = 16
"""Channels that NVLS uses. Published: NCCL, src/init.cc, nvlsChannels of Hopper."""
MOST_HEADS: Final = 32
"""Largest number of ranks in a group that a switch reduces for. Published: NCCL, NCCL_MAX_NVLS_ARITY."""


def can_reduce(size: Ints, cluster: Cluster) -> Bools:
    """Return whether switches can reduce for groups with `size` ranks in one NVLink domain.

    NCCL uses them only for groups of more than two ranks.
    """
    capable = cluster.device == "cuda" and cluster.nvlink_bandwidth_gb_per_s >= SWITCHED_FROM_GB_PER_S
    return (size > 2) & np.bool_(capable)


def all_reduce_factor(c: Columns, group: ProcessGroups, cluster: Cluster, measured: bool) -> Floats:
    """Return the time of an all-reduce over a reference time.

    The reference is the measured time with NVLS on if the all-reduce was `measured`, and the time of a ring otherwise.
    """
    capable = can_reduce(group.size, cluster) & (group.ranks_per_domain == group.size)
    ring = SWITCH_SPEEDUP if measured else 1.0
    factor = np.where(c.on("nccl_nvls_enable"), ring / SWITCH_SPEEDUP, ring)
    return np.where(capable, factor, 1.0)


def registered_factor(c: Columns, group: ProcessGroups) -> Floats:
    """Return the time of an all-gather or reduce-scatter over the time that it takes with plain buffers.

    Registered buffers make it faster inside an NVLink domain. Across domains the fabric limits the rate, and the factor
    is 1.
    """
    inside = group.ranks_per_domain == group.size
    return np.where(c.on("nccl_ub") & inside, NVLINK_EFFICIENCY / REGISTERED_EFFICIENCY, 1.0)


def switch_bytes(size: Ints, cluster: Cluster) -> Floats:
    """Return the bytes that the communicator of a group of `size` ranks takes for NVLS."""
    heads = np.minimum(np.minimum(size, cluster.nvlink_domain_gpus), MOST_HEADS)
    return np.where(can_reduce(heads, cluster), heads * NVLS_CHANNELS * NVLS_CHANNEL_BYTES, 0.0)
