"""The cluster: the GPUs that a sweep may use, and what connects them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from tuner.core.workload import Precision
from tuner.errors import InputError
from tuner.files import STRICT
from tuner.printable import OneLine

MOST_GPUS: Final = 1 << 20
"""The most GPUs of a cluster. Assumed: no cluster comes near."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, or one CPU rank that takes the place of a GPU."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: OneLine
    memory_gib: float
    """Memory that a process can allocate, in GiB (1024^3 bytes)."""
    peak_tflops: Mapping[Precision, float]
    """Peak throughput of dense matrix products (without sparsity) in TFLOP/s, by precision."""
    memory_bandwidth_gb_per_s: float
    """Bandwidth of the GPU's memory in GB/s (10^9 bytes)."""

    def __post_init__(self) -> None:
        if self.memory_gib <= 0 or self.memory_bandwidth_gb_per_s <= 0:
            raise ValueError("memory_gib and memory_bandwidth_gb_per_s must be above 0")
        if not self.peak_tflops or any(value <= 0 for value in self.peak_tflops.values()):
            raise ValueError("peak_tflops needs at least one precision, each above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """`nodes` machines with `gpus_per_node` equal GPUs each.

    Bandwidths are per GPU and direction, in GB/s (10^9 bytes).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: OneLine
    device: Literal["cuda", "cpu"] = "cuda"
    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int
    transformer_engine: bool = True
    """Whether the environment of the trials has Transformer Engine. Without it, or on CPU, the built-in program runs
    Torch's own layers, which need more memory."""
    cores: int | None = None
    """Processor cores that the CPU ranks of one node share; with None, each rank has a core of its own."""
    nvlink_domain_gpus: int
    """Number of GPUs in an NVLink domain, which reach each other at `nvlink_bandwidth_gb_per_s`; a domain may span
    nodes (NVL72)."""
    nvlink_bandwidth_gb_per_s: float
    nvlink_latency_us: float
    fabric_bandwidth_gb_per_s: float
    """Bandwidth between NVLink domains."""
    fabric_latency_us: float
    sources: Mapping[OneLine, OneLine] = field(default_factory=dict)
    """Source of each figure, by field name."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "nvlink_domain_gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("world_size", "nvlink_domain_gpus"):
            if getattr(self, name) > MOST_GPUS:
                raise ValueError(f"{name} must be at most {MOST_GPUS:,}, not {getattr(self, name)}")
        if self.cores is not None and (self.device == "cuda" or self.cores < 1):
            raise ValueError(
                f"cores ({self.cores}) must be at least 1, and can be stated only for device cpu"
            )

    @property
    def world_size(self) -> int:
        """Return the number of GPUs in the cluster; each runs one rank."""
        return self.nodes * self.gpus_per_node


def with_gpus(cluster: Cluster, gpus: int) -> Cluster:
    """Return a copy of the cluster that has `gpus` GPUs in total: whole nodes, or a part of one node.

    Raises:
        InputError: if `gpus` is below 1, or exceeds the GPUs of one node and is not a whole number of nodes.
    """
    if gpus < 1:
        raise InputError(f"{gpus} GPUs: give at least 1")
    gpus_per_node = min(gpus, cluster.gpus_per_node)
    if gpus % gpus_per_node:
        raise InputError(
            f"{gpus} GPUs are not a whole number of nodes of {cluster.name}, which have "
            f"{cluster.gpus_per_node} GPUs each"
        )
    domain = min(gpus, cluster.nvlink_domain_gpus)
    return replace(
        cluster, nodes=gpus // gpus_per_node, gpus_per_node=gpus_per_node, nvlink_domain_gpus=domain
    )
