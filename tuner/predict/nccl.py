"""Two options of NCCL: reductions inside NVLink's switches (NVLS), and buffers that are registered with NCCL."""

from typing import Final

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns, Floats, Ints
from tuner.predict.time.collectives import NVLINK_EFFICIENCY, ProcessGroups

SWITCH_SPEEDUP: Final = 480 / 370
"""Bus bandwidth of an all-reduce with NVLS, divided by its bus bandwidth without NVLS. Published: 480 and 370 GB/s on 8
H100 (S. Jeaugey, NCCL's author, in github.com/NVIDIA/nccl-tests/issues/212)."""
REGISTERED_EFFICIENCY: Final = 370 / 450
"""Share of NVLink's rate that NCCL reaches at any size if it does not copy through buffers of its own; the protocol
takes the rest. Published: 370 of 450 GB/s (github.com/NVIDIA/nccl-tests/issues/212)."""
SWITCHED_FROM_GB_PER_S: Final = 450
"""Smallest rate of NVLink, in GB/s per direction, at which its switches can reduce. Published: the rate of NVLink's
fourth generation, in Hopper."""
NVLS_CHANNEL_BYTES: Final = 2 * 8 * 128 * 1024
"""Bytes of the NVLS buffers per channel and head (a head is a rank of the group): both directions, 8 steps of 128 KiB.
Published: NCCL, src/transport/nvls.cc, ncclNvlsBufferSetup."""
NVLS_CHANNELS: Final = 16
"""Number of channels that NVLS uses. Published: NCCL, src/init.cc, nvlsChannels of Hopper."""
MOST_HEADS: Final = 32
"""Largest number of ranks in a group for which a switch reduces. Published: NCCL, NCCL_MAX_NVLS_ARITY."""


def can_reduce(size: Ints, cluster: Cluster) -> Bools:
    """Return whether NVLink's switches can reduce for groups of `size` ranks that lie in one NVLink domain.

    The result has one value per element of `size`. NCCL uses the switches only for groups of more than two ranks.
    """
    capable = cluster.device == "cuda" and cluster.nvlink_bandwidth_gb_per_s >= SWITCHED_FROM_GB_PER_S
    return (size > 2) & np.bool_(capable)


def all_reduce_factor(c: Columns, group: ProcessGroups, cluster: Cluster, measured: bool) -> Floats:
    """Return the time of an all-reduce under each layout, divided by a reference time; shape [rows].

    If the calibration `measured` all-reduces, the reference is the measured time, which includes NVLS. Otherwise it is
    the time of a ring without NVLS.
    """
    capable = can_reduce(group.size, cluster) & (group.ranks_per_domain == group.size)
    ring = SWITCH_SPEEDUP if measured else 1.0
    factor = np.where(c.on("nccl_nvls_enable"), ring / SWITCH_SPEEDUP, ring)
    return np.where(capable, factor, 1.0)


def registered_factor(c: Columns, group: ProcessGroups) -> Floats:
    """Return the time of an all-gather or reduce-scatter, divided by its time without registered buffers; shape [rows].

    The factor is below 1 if buffers are registered (nccl_ub) and the group lies inside one NVLink domain. Otherwise it
    is 1, since the fabric limits the rate across domains.
    """
    inside = group.ranks_per_domain == group.size
    return np.where(c.on("nccl_ub") & inside, NVLINK_EFFICIENCY / REGISTERED_EFFICIENCY, 1.0)


def switch_bytes(size: Ints, cluster: Cluster) -> Floats:
    """Return the bytes of NVLS buffers on each rank of a group of `size` ranks; 0 if switches cannot reduce for it."""
    heads = np.minimum(np.minimum(size, cluster.nvlink_domain_gpus), MOST_HEADS)
    return np.where(can_reduce(heads, cluster), heads * NVLS_CHANNELS * NVLS_CHANNEL_BYTES, 0.0)
