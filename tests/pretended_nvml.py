"""Stands in for the module pynvml on a machine with any GPUs, slices and processes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1024**3


@dataclass(kw_only=True, slots=True)
class Gpu:
    """A GPU as NVML describes it; a test may change it at any time."""

    uuid: str = "GPU-0"
    total_gib: float = 80.0
    used_gib: float = 0.0
    reserve_gib: float = 0.6
    """What the driver keeps for itself; the second version of NVML's figure leaves it out."""
    computing: Mapping[int, float | None] = field(default_factory=dict)
    """Memory in GiB of each process that computes, by its id; None if the driver does not say."""
    under_mps: Mapping[int, float | None] = field(default_factory=dict)
    drawing: Mapping[int, float | None] = field(default_factory=dict)
    error: int = 0
    """The NVML error with which the GPU answers every question; 0 for none."""
    refuses: Mapping[str, int] = field(default_factory=dict)
    """The NVML error with which the GPU answers one function, by the function's name."""


class PretendedNvml:
    """The functions and constants of pynvml that launchers/watch asks for memory and processes.

    Args:
        gpus: The GPUs with an index, in their order.
        slices: MIG slices, which have an identifier only.
        open_s: How long nvmlInit takes, in seconds.
        answer_s: How long an answer about a GPU takes, in seconds.
    """

    NVMLError = pynvml.NVMLError
    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def __init__(
        self, gpus: Sequence[Gpu], slices: Sequence[Gpu] = (), *, open_s: float = 0.0, answer_s: float = 0.0
    ) -> None:
        self.gpus, self.slices = gpus, slices
        self.open_s, self.answer_s = open_s, answer_s
        self.opened = 0

    def nvmlInit(self) -> None:
        time.sleep(self.open_s)
        self.opened += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if not 0 <= index < len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._asked(self.gpus[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in (*self.gpus, *self.slices):
            if gpu.uuid == uuid:
                return self._asked(gpu)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return self._asked(gpu).uuid

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> SimpleNamespace:
        self._asked(gpu, "nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo")
        used_gib = gpu.used_gib if version else gpu.used_gib + gpu.reserve_gib
        return SimpleNamespace(total=int(gpu.total_gib * GIB), used=int(used_gib * GIB))

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return _processes(self._asked(gpu, "nvmlDeviceGetComputeRunningProcesses").computing)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return _processes(self._asked(gpu, "nvmlDeviceGetMPSComputeRunningProcesses").under_mps)

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
        return _processes(self._asked(gpu, "nvmlDeviceGetGraphicsRunningProcesses").drawing)

    def _asked(self, gpu: Gpu, function: str = "") -> Gpu:
        time.sleep(self.answer_s)
        if code := gpu.error or gpu.refuses.get(function, 0):
            raise pynvml.NVMLError(code)
        return gpu


def _processes(gib_by_pid: Mapping[int, Any]) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=None if gib is None else int(gib * GIB))
        for pid, gib in gib_by_pid.items()
    ]
