"""What NCCL's switches change: reductions inside NVLink's switches (NVLS), and buffers registered with it."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Ints
from tuner.predict.time.collectives import NVLINK_EFFICIENCY, ProcessGroups

Floats = NDArray[np.float64]

SWITCH_SPEEDUP: Final = 480 / 370
"""Of an all-reduce: bus bandwidth in GB/s with and without NVLS on 8 H100 (S. Jeaugey, NCCL's author, in
github.com/NVIDIA/nccl-tests/issues/212)."""
REGISTERED_EFFICIENCY: Final = 370 / 450
"""Share of NVLink's rate that is left after the protocol's overhead (ibid.): what NCCL reaches at any size where it
need not copy through buffers of its own."""
SWITCHED_FROM_GB_PER_S: Final = 450
"""NVLink's rate from which its switches can reduce: Hopper's, the fourth generation."""
NVLS_CHANNEL_BYTES: Final = 2 * 8 * 128 * 1024
"""Of a channel and head: both directions, 8 steps of 128 KiB (NCCL: src/transport/nvls.cc, ncclNvlsBufferSetup)."""
NVLS_CHANNELS: Final = 16
"""Channels that NVLS takes (NCCL: src/init.cc, nvlsChannels of Hopper)."""
MOST_HEADS: Final = 32
"""Ranks of a switch's group at most (NCCL: NCCL_MAX_NVLS_ARITY)."""


def can_reduce(size: Ints, cluster: Cluster) -> Bools:
    """Whether switches can reduce for groups with `size` ranks in one NVLink domain; NCCL wants more than two."""
    capable = cluster.device == "cuda" and cluster.nvlink_bandwidth_gb_per_s >= SWITCHED_FROM_GB_PER_S
    return (size > 2) & np.bool_(capable)


def all_reduce_factor(c: Columns, ranks: ProcessGroups, cluster: Cluster, measured: bool) -> Floats:
    """What an all-reduce takes over a ring's time; where it was `measured`, with NVLS on, over that time."""
    capable = can_reduce(ranks.size, cluster) & (ranks.ranks_per_domain == ranks.size)
    ring = SWITCH_SPEEDUP if measured else 1.0
    factor = np.where(c.on("nccl_nvls_enable"), ring / SWITCH_SPEEDUP, ring)
    return np.where(capable, factor, 1.0)


def registered_factor(c: Columns, ranks: ProcessGroups) -> Floats:
    """What gathering and scattering of registered buffers takes over that of plain ones; fabrics bound the rest."""
    inside = ranks.ranks_per_domain == ranks.size
    return np.where(c.on("nccl_ub") & inside, NVLINK_EFFICIENCY / REGISTERED_EFFICIENCY, 1.0)


def switch_bytes(size: Ints, cluster: Cluster) -> Floats:
    """Bytes that one communicator takes for NVLS, for groups of `size` ranks."""
    heads = np.minimum(np.minimum(size, cluster.nvlink_domain_gpus), MOST_HEADS)
    return np.where(can_reduce(heads, cluster), heads * NVLS_CHANNELS * NVLS_CHANNEL_BYTES, 0.0)
