"""Identifies this machine: its GPU or processor model, and the versions on which measurements on it depend.

GPUs are queried through NVML, since torch would take memory of a GPU.
"""

import os
import platform
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pynvml

from tuner.core.cluster import Cluster
from tuner.predict.calibration import Machine


def this_machine(cluster: Cluster) -> Machine | None:
    """Return this machine's identity for measurements on a cluster; None if it cannot be the cluster's only node.

    That is so if the cluster has several nodes, or more GPUs of its model than this machine.
    """
    if cluster.nodes > 1:
        return None
    versions = {"python": platform.python_version(), "torch": version("torch")}
    if cluster.device == "cpu":
        name, count = _processor(), len(os.sched_getaffinity(0))
    else:
        name, (count, driver) = cluster.gpu.name, _gpus_and_driver(cluster.gpu.name)
        if cluster.world_size > count:
            return None
        versions |= {"driver": driver, **_cuda_libraries()}
    return Machine(
        device=cluster.device, name=name, count=count, world_size=cluster.world_size, versions=versions
    )


def measuring_machine(cluster: Cluster) -> Machine | None:
    """Return `this_machine(cluster)` with the further versions on which a trial's measurements depend.

    These are the versions of Megatron-Core, Transformer Engine and megatune, as far as they are installed.
    """
    machine = this_machine(cluster)
    if machine is None:
        return None
    versions = {}
    for package in ("megatron-core", "transformer-engine", "megatune"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return replace(machine, versions={**machine.versions, **versions})


def _processor() -> str:
    """Return the processor's model name, or its architecture if Linux states no name."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        for key, _, value in (line.partition(":") for line in lines):
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()


def _cuda_libraries() -> dict[str, str]:
    """Return the versions of the packages with CUDA libraries that torch's wheel depends on, by package name.

    A torch that was built in another way has no such packages; then the result is empty, and torch's version suffices.
    """
    libraries = ("nvidia-nccl", "nvidia-cuda-runtime", "nvidia-cublas")
    return {each.name: each.version for each in distributions() if (each.name or "").startswith(libraries)}


def _gpus_and_driver(name: str) -> tuple[int, str]:
    """Return the number of GPUs of the model `name`, and the driver's version; 0 and an empty text without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0, ""
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        count = sum(pynvml.nvmlDeviceGetName(handle) == name for handle in handles)
        return count, str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
