"""Describes this machine as a cluster of its GPUs, or of its CPU cores if it has no GPU.

The peaks and bandwidths of a GPU model come from the built-in cluster of that model in `search_spaces`.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from search_spaces.loader import cluster_names, load_cluster
from tuner.core.cluster import Cluster
from tuner.errors import InputError, did_you_mean

NAME = "this-machine"
MAX_CPU_RANKS = 8
"""The most CPU ranks of a detected cluster. Assumed: more ranks start slower and measure nothing new."""

MAX_RANKS_PER_CORE = 4
"""The most ranks per CPU core of any CPU cluster. Assumed: more ranks wait for each other longer than they work."""

_PCIE_EFFICIENCY = 0.8
"""The share of PCIe's raw rate that transfers reach. Assumed: typical of large transfers."""
_GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU that is visible to CUDA."""

    name: str
    memory_gib: float
    """The memory that a process can allocate, in GiB, as CUDA states it."""
    has_nvlink: bool
    pcie_gb_per_s: float
    """PCIe's raw rate in one direction, without protocol overhead, in GB/s; 0 if the driver does not report it."""


def detect_cluster() -> Cluster:
    """Return a cluster that describes this machine: its visible GPUs, or CPU ranks with Gloo if it has no GPU.

    Raises:
        InputError: if the GPUs are of several models, or of a model that no built-in cluster has.
    """
    import torch

    if torch.cuda.is_available():
        return as_installed(gpu_cluster(_visible_devices()))
    return cpu_cluster(len(os.sched_getaffinity(0)), _usable_memory_bytes())


def as_installed(cluster: Cluster) -> Cluster:
    """Return the cluster with what is installed beside this process, which its trials share, if it can be here.

    A machine without a GPU plans for another machine, so there the cluster's own word counts.
    """
    if cluster.device == "cpu" or not _has_gpus():
        return cluster
    return replace(cluster, transformer_engine=find_spec("transformer_engine") is not None)


def _has_gpus() -> bool:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        count: int = pynvml.nvmlDeviceGetCount()
        return count > 0
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def gpu_cluster(devices: Sequence[Device]) -> Cluster:
    """Return a cluster of one node with these GPUs; all else is that of the built-in cluster with the same GPU model.

    If a GPU has no NVLink, bandwidth and latency within the node are those of PCIe instead of NVLink.

    Raises:
        InputError: if the GPUs are of several models, or of a model that no built-in cluster has.
    """
    names = sorted({device.name for device in devices})
    if len(names) > 1:
        raise InputError(
            f"this machine has GPUs of several models ({', '.join(names)}): "
            "choose one with CUDA_VISIBLE_DEVICES"
        )
    built_in = _built_in_cluster(names[0])
    is_linked = all(device.has_nvlink for device in devices)
    bandwidth, latency = built_in.nvlink_bandwidth_gb_per_s, built_in.nvlink_latency_us
    source = built_in.sources["nvlink_bandwidth_gb_per_s"]
    if not is_linked and len(devices) > 1:
        pcie = load_cluster("workstation")
        slowest = min(device.pcie_gb_per_s for device in devices) * _PCIE_EFFICIENCY
        bandwidth, latency = slowest or pcie.nvlink_bandwidth_gb_per_s, pcie.nvlink_latency_us
        source = "NVML: no NVLink, so PCIe's"
    return replace(
        built_in,
        name=NAME,
        gpu=replace(built_in.gpu, memory_gib=min(device.memory_gib for device in devices)),
        nodes=1,
        gpus_per_node=len(devices),
        nvlink_domain_gpus=len(devices),
        nvlink_bandwidth_gb_per_s=bandwidth,
        nvlink_latency_us=latency,
        sources={
            **built_in.sources,
            "gpu.memory_gib": "torch.cuda on this machine",
            "nvlink_bandwidth_gb_per_s": source,
        },
    )


def cpu_cluster(cores: int, memory_bytes: int) -> Cluster:
    """Return a cluster of CPU ranks, one per core but at least 2 and at most 8, that share half of the memory.

    Its other figures are those of the built-in cluster cpu-4, which also bounds the memory per rank from below.

    Args:
        cores: The number of CPU cores of the machine.
        memory_bytes: The machine's memory in bytes.
    """
    ranks = min(max(cores, 2), MAX_CPU_RANKS)
    built_in = load_cluster("cpu-4")
    # The other half holds the interpreters, torch itself and whatever else runs here.
    memory_gib = max(round(memory_bytes / 2 / ranks / _GIB, 2), built_in.gpu.memory_gib)
    return replace(
        built_in,
        name=NAME,
        gpu=replace(built_in.gpu, memory_gib=memory_gib),
        gpus_per_node=ranks,
        cores=cores,
        nvlink_domain_gpus=ranks,
        sources={**built_in.sources, "gpu.memory_gib": "half of this machine's memory, shared by the ranks"},
    )


def _built_in_cluster(gpu_name: str) -> Cluster:
    """Return the built-in cluster with this GPU model.

    Raises:
        InputError: if there is none. The error says where to write the model's figures.
    """
    by_gpu_name = {cluster.gpu.name: cluster for cluster in map(load_cluster, cluster_names())}
    if gpu_name not in by_gpu_name:
        raise InputError(
            f"the peak FLOP/s and bandwidths of '{gpu_name}' are not known{did_you_mean(gpu_name, by_gpu_name)}: "
            "write them into a cluster YAML file (the fields of tuner.core.cluster.Cluster) and name that file "
            "in place of 'detect'"
        )
    return by_gpu_name[gpu_name]


def _usable_memory_bytes() -> int:
    """Return the smaller of the machine's memory and the memory limit of this process's control group, in bytes."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no control groups, or "max"
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


def _visible_devices() -> list[Device]:
    import pynvml
    import torch

    pynvml.nvmlInit()
    try:
        return [_device(torch.cuda.get_device_properties(n)) for n in range(torch.cuda.device_count())]
    finally:
        pynvml.nvmlShutdown()


def _device(properties: Any) -> Device:
    import pynvml

    # CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's, so they are matched by their UUID.
    kind = "MIG" if "MIG" in properties.name.split() else "GPU"
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{properties.uuid}".encode("ascii"))
    return Device(
        name=properties.name,
        memory_gib=round(properties.total_memory / _GIB, 1),
        has_nvlink=_has_nvlink(handle),
        pcie_gb_per_s=_pcie_gb_per_s(handle),
    )


def _has_nvlink(handle: Any) -> bool:
    import pynvml

    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED:
                return True
        except pynvml.NVMLError:
            return False  # links are numbered without gaps, so this was the last
    return False


def _pcie_gb_per_s(handle: Any) -> float:
    import pynvml

    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        lanes = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    except pynvml.NVMLError:
        return 0.0
    # Generation 3 moves 8 GT/s per lane with 128 payload bits in 130, and each later one doubles it.
    return float(lanes * 2.0 ** (generation - 3) * 128 / 130)


def check_machine(cluster: Cluster) -> None:
    """Check that this machine can run the jobs of a cluster.

    Raises:
        InputError: if the cluster has more GPUs than are visible here, or more CPU ranks than its cores allow
            (MAX_RANKS_PER_CORE).
    """
    wanted = cluster.world_size
    if cluster.device == "cuda":
        import torch

        present = torch.cuda.device_count()
        if wanted > present:
            raise InputError(
                f"key 'cluster': {cluster.name} is {cluster.nodes} x {cluster.gpus_per_node} = {wanted} GPUs, but "
                f"this machine has {present}: set cluster.nodes and cluster.gpus_per_node to what is here, or "
                "'cluster: detect'; `megatune plan` works for any cluster"
            )
    elif wanted > (most := MAX_RANKS_PER_CORE * len(os.sched_getaffinity(0))):
        raise InputError(
            f"key 'cluster': {cluster.name} is {wanted} CPU ranks, but this machine's cores carry {most} "
            f"({MAX_RANKS_PER_CORE} a core): lower cluster.gpus_per_node"
        )
