"""How long collectives take on a cluster, for many layouts at once. Bytes in, milliseconds out.

The ring model of NCCL: a collective of n ranks moves (n-1)/n of the whole buffer over each rank's link (twice
for an all-reduce), at the bus bandwidth of the slowest link, plus a latency a hop.
Source: NVIDIA nccl-tests, doc/PERFORMANCE.md; the cost of hops: NCCL src/graph/tuning.cc.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Ints

Floats: TypeAlias = NDArray[np.float64]

NVLINK_EFFICIENCY: Final = 0.7
"""Share of NVLink's rate that a layer's messages reach; the largest get 0.75 to 0.8 on A100s (nccl-tests)."""
FABRIC_EFFICIENCY: Final = 0.8
"""The same of the network between: the largest get 0.9 of InfiniBand, and jobs share its upper links."""
MS_PER_US: Final = 1e-3
MS_PER_BYTE_AT_GB_PER_S: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of one communicator, one value a layout."""

    size: Ints
    stride: Ints
    """How far apart its neighbours are."""
    inner: Ints
    """Of them, those in one NVLink domain."""

    @property
    def outer(self) -> Floats:
        """NVLink domains that the group spans."""
        return self.size / self.inner


def group(size: Ints, stride: Ints, cluster: Cluster) -> Group:
    """The group of `size` ranks, `stride` apart: Megatron numbers ranks tp first, then cp, ep, dp, and pp last."""
    inner = np.clip(np.minimum(cluster.nvlink_domain_gpus, cluster.world_size) // stride, 1, size)
    return Group(size, stride, inner)


def gather_ms(whole_bytes: Floats, ranks: Group, cluster: Cluster) -> Floats:
    """An all-gather to, or a reduce-scatter from, `whole_bytes` on every rank."""
    moved = whole_bytes * (ranks.size - 1) / ranks.size
    return moved / _bus_gb_per_s(ranks, cluster) * MS_PER_BYTE_AT_GB_PER_S + _hops_ms(ranks, cluster)


def exchange_ms(inside_bytes: Floats, across_bytes: Floats, ranks: Group, cluster: Cluster) -> Floats:
    """An all-to-all in which a rank sends so much inside its NVLink domain, and so much out of it.

    Both go at once; the latency is that of a message to each, NCCL's sends to all peers being concurrent.
    """
    inside = inside_bytes / (NVLINK_EFFICIENCY * cluster.nvlink_bandwidth_gb_per_s)
    across = across_bytes / (FABRIC_EFFICIENCY * cluster.fabric_bandwidth_gb_per_s)
    rate_ms = np.maximum(inside, across) * MS_PER_BYTE_AT_GB_PER_S
    latency_us = np.where(ranks.inner > 1, cluster.nvlink_latency_us, 0.0)
    latency_us = np.where(ranks.outer > 1, cluster.fabric_latency_us, latency_us)
    return rate_ms + latency_us * MS_PER_US


def send_ms(sent_bytes: Floats, ranks: Group, cluster: Cluster) -> Floats:
    """A message of every rank to its neighbour, over the fabric where the group leaves its NVLink domain."""
    crosses = ranks.outer > 1
    nvlink = NVLINK_EFFICIENCY * cluster.nvlink_bandwidth_gb_per_s
    rate = np.where(crosses, FABRIC_EFFICIENCY * cluster.fabric_bandwidth_gb_per_s, nvlink)
    latency_us = np.where(crosses, cluster.fabric_latency_us, cluster.nvlink_latency_us)
    return sent_bytes / rate * MS_PER_BYTE_AT_GB_PER_S + latency_us * MS_PER_US


def _bus_gb_per_s(ranks: Group, cluster: Cluster) -> Floats:
    """Each rank's rate in a ring: where it leaves the NVLink domain, its members there share all their NICs."""
    nvlink = NVLINK_EFFICIENCY * cluster.nvlink_bandwidth_gb_per_s
    fabric = FABRIC_EFFICIENCY * cluster.fabric_bandwidth_gb_per_s
    return np.where(ranks.inner == ranks.size, nvlink, np.minimum(nvlink, ranks.inner * fabric))


def _hops_ms(ranks: Group, cluster: Cluster) -> Floats:
    """A ring in the NVLink domain, a tree between domains."""
    hops_us = (ranks.inner - 1) * cluster.nvlink_latency_us + np.log2(ranks.outer) * cluster.fabric_latency_us
    return hops_us * MS_PER_US
