"""The time of collectives in milliseconds, computed from the cluster's stated figures for many layouts at once.

This is NCCL's ring model. A collective of n ranks moves (n-1)/n of the whole buffer over each rank's link (twice for an
all-reduce) at the bus bandwidth of the slowest link, and adds one latency per hop. Sources: NVIDIA nccl-tests,
doc/PERFORMANCE.md (the model); NCCL, src/graph/tuning.cc (the cost of a hop).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Floats, Ints

NVLINK_EFFICIENCY: Final = 0.7
"""Share of NVLink's stated rate that a layer's messages reach. Published for large all-reduces on A100s: 200 and 208 of
300 GB/s (github.com/NVIDIA/nccl-tests, issues 149 and 178), which are 0.67 and 0.69."""
FABRIC_EFFICIENCY: Final = 0.8
"""Share of the stated rate between NVLink domains that messages reach. Assumed: the largest messages reach 0.9 of
InfiniBand's rate, and jobs share its upper links."""
MS_PER_US: Final = 1e-3
"""Milliseconds per microsecond."""
MS_PER_BYTE_AT_GB_PER_S: Final = 1e-6
"""Milliseconds that one byte takes at 1 GB/s."""


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """The process groups of one kind of parallelism, such as tp, in every layout: arrays of shape [rows]."""

    size: Ints
    """Number of ranks in a group."""
    stride: Ints
    """Difference between the numbers of neighbouring ranks of a group, in Megatron's numbering of all ranks."""
    ranks_per_domain: Ints
    """Number of ranks of a group that share one NVLink domain."""

    @property
    def domains(self) -> Floats:
        """Return the number of NVLink domains that a group spans."""
        return self.size / self.ranks_per_domain


def process_groups(size: Ints, stride: Ints, cluster: Cluster) -> ProcessGroups:
    """Return groups of `size` ranks, whose numbers are `stride` apart, as they lie on the cluster's NVLink domains.

    Megatron numbers ranks by tp first, then by cp, ep and dp, and by pp last.
    """
    domain_gpus = np.minimum(cluster.nvlink_domain_gpus, cluster.world_size)
    return ProcessGroups(size, stride, np.clip(domain_gpus // stride, 1, size))


def gather_ms(whole_bytes: Floats, group: ProcessGroups, cluster: Cluster) -> Floats:
    """Return the time in ms of an all-gather or of a reduce-scatter; shape [rows].

    `whole_bytes` are the bytes of the buffer that the all-gather fills, or that the reduce-scatter reads, on each rank.
    """
    moved = whole_bytes * (group.size - 1) / group.size
    return moved / _ring_gb_per_s(group, cluster) * MS_PER_BYTE_AT_GB_PER_S + _hops_ms(group, cluster)


def exchange_ms(inside_bytes: Floats, across_bytes: Floats, group: ProcessGroups, cluster: Cluster) -> Floats:
    """Return the time in ms of an all-to-all; shape [rows].

    Each rank sends `inside_bytes` within its NVLink domain and `across_bytes` out of it, both at once. The latency is
    that of one message, since NCCL sends to all peers concurrently.
    """
    inside = inside_bytes / (NVLINK_EFFICIENCY * cluster.nvlink_bandwidth_gb_per_s)
    across = across_bytes / (FABRIC_EFFICIENCY * cluster.fabric_bandwidth_gb_per_s)
    rate_ms = np.maximum(inside, across) * MS_PER_BYTE_AT_GB_PER_S
    latency_us = np.where(group.ranks_per_domain > 1, cluster.nvlink_latency_us, 0.0)
    latency_us = np.where(group.domains > 1, cluster.fabric_latency_us, latency_us)
    return rate_ms + latency_us * MS_PER_US


def send_ms(sent_bytes: Floats, group: ProcessGroups, cluster: Cluster) -> Floats:
    """Return the time in ms in which every rank sends one message of `sent_bytes` to its neighbour; shape [rows].

    The messages use the fabric if the group spans several NVLink domains.
    """
    crosses = group.domains > 1
    nvlink = NVLINK_EFFICIENCY * cluster.nvlink_bandwidth_gb_per_s
    gb_per_s = np.where(crosses, FABRIC_EFFICIENCY * cluster.fabric_bandwidth_gb_per_s, nvlink)
    latency_us = np.where(crosses, cluster.fabric_latency_us, cluster.nvlink_latency_us)
    return sent_bytes / gb_per_s * MS_PER_BYTE_AT_GB_PER_S + latency_us * MS_PER_US


def _ring_gb_per_s(group: ProcessGroups, cluster: Cluster) -> Floats:
    """Return the rate in GB/s at which each rank sends in a ring over the group; shape [rows].

    If the ring leaves an NVLink domain, the ranks of the group in that domain share all of their network ports.
    """
    nvlink = NVLINK_EFFICIENCY * cluster.nvlink_bandwidth_gb_per_s
    fabric = FABRIC_EFFICIENCY * cluster.fabric_bandwidth_gb_per_s
    spanning = np.minimum(nvlink, group.ranks_per_domain * fabric)
    return np.where(group.ranks_per_domain == group.size, nvlink, spanning)


def _hops_ms(group: ProcessGroups, cluster: Cluster) -> Floats:
    """Return the latency in ms of all hops: of a ring inside each NVLink domain, and of a tree between the domains."""
    ring_us = (group.ranks_per_domain - 1) * cluster.nvlink_latency_us
    return (ring_us + np.log2(group.domains) * cluster.fabric_latency_us) * MS_PER_US
