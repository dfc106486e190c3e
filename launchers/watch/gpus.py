"""Asks the driver how much memory of the GPUs is in use, and by whom.

It asks NVML and never torch, which would itself use memory of a GPU.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import pynvml

OPEN_S: Final = 60.0
"""How long NVML may take for its first answer, in seconds. Assumed: it wakes every GPU first, and without the
persistence mode one takes 1.5 s and more."""
ANSWER_S: Final = 10.0
"""How long NVML may take for each further answer, in seconds. Assumed."""
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class GpuSelection:
    """The GPUs of a job: the first `count` of those that are visible to it."""

    count: int
    """The number of GPUs; 0 on CPU."""
    visible_devices: str | None = None
    """The job's CUDA_VISIBLE_DEVICES; None if it is not set, so that the job sees every GPU."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that uses a GPU."""

    pid: int
    """The process's id on the machine; in a container, the process may have another."""
    used_gib: float | None
    """The GPU memory that it uses; None if the driver does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """How much memory of one GPU is in use, and by which processes."""

    name: str
    """The index or the identifier by which CUDA_VISIBLE_DEVICES may name the GPU."""
    used_gib: float | None = None
    """The memory in use; None if the driver does not say, as for a GPU that is cut into MIG slices."""
    total_gib: float | None = None
    counts_reserve: bool = False
    """Whether `used_gib` includes what the driver keeps for itself, as drivers before release 510 report it."""
    processes: tuple[GpuProcess, ...] = ()
    """The processes that the driver names."""
    fault: str = ""
    """NVML's word for why it says nothing about the GPU; empty if it does."""


class Driver:
    """NVML, which is opened at the first question and held open while this process lives.

    As long as it is open, the GPUs stay awake. Otherwise every question might wake them anew.

    Args:
        nvml: The module pynvml, or an object with its functions.
        open_s: How long the first answer may take, in seconds.
        answer_s: How long a further answer may take, in seconds.
    """

    def __init__(self, nvml: Any = pynvml, open_s: float = OPEN_S, answer_s: float = ANSWER_S) -> None:
        self._nvml, self._answer_s = nvml, answer_s
        self._limit_s = open_s
        self._opening = threading.Lock()
        self._is_open = False

    def open(self) -> Any:
        """Return NVML, opened; raises NVMLError if there is no driver, and waits for a broken GPU, maybe for ever."""
        with self._opening:
            if not self._is_open:
                self._nvml.nvmlInit()
                self._is_open = True
        return self._nvml

    def uses(self, selection: GpuSelection) -> tuple[GpuUse, ...] | None:
        """Return the use of each selected GPU; empty without a driver, and None if it does not answer in time."""
        if not selection.count:
            return ()
        answers: list[tuple[GpuUse, ...]] = []
        # In a thread, since the driver may wait for a broken GPU for ever.
        thread = threading.Thread(target=lambda: answers.append(self._ask(selection)), daemon=True)
        thread.start()
        thread.join(self._limit_s)
        self._limit_s = self._answer_s
        return answers[0] if answers else None

    def _ask(self, selection: GpuSelection) -> tuple[GpuUse, ...]:
        try:
            nvml = self.open()
            names = names_of(nvml, selection)
        except self._nvml.NVMLError:
            return ()
        return tuple(_use(nvml, name) for name in names)


@cache
def driver() -> Driver:
    """Return the driver of this process; NVML, too, has one state per process."""
    return Driver()


def names_of(nvml: Any, selection: GpuSelection) -> list[str]:
    """Return the index or the identifier of each selected GPU as a text; NVML must be open."""
    return visible(selection.visible_devices, nvml.nvmlDeviceGetCount())[: selection.count]


def visible(visible_devices: str | None, count: int) -> list[str]:
    """Return the indices or identifiers that CUDA_VISIBLE_DEVICES names, in its order; if it is not set, all indices.

    `count` is the number of GPUs of the machine. CUDA ignores whatever follows an index that no GPU has.
    """
    if visible_devices is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for part in visible_devices.split(","):
        name = part.strip()
        if not name.startswith(("GPU-", "MIG-")) and not (name.isdecimal() and int(name) < count):
            break
        names.append(name)
    return names


def handle_of(nvml: Any, name: str) -> Any:
    """Return NVML's handle of a GPU or MIG slice, given by an index or identifier that `visible` returned.

    As for CUDA, the beginning of a GPU's identifier suffices.
    """
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    for index in range(nvml.nvmlDeviceGetCount()):
        with suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if str(nvml.nvmlDeviceGetUUID(handle)).startswith(name):
                return handle
    return nvml.nvmlDeviceGetHandleByUUID(name)


def processes_on(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """Return the processes on a GPU that the driver names: those that compute, also under MPS, and those that draw."""
    used_gib: dict[int, float | None] = {}
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        # The GPU, a slice of one, or the driver does not report this; for an old driver, pynvml has its own error.
        with suppress(nvml.NVMLError, pynvml.NVMLLibraryMismatchError):
            for process in ask(handle):
                stated = process.usedGpuMemory
                known = used_gib.get(process.pid)
                used_gib[process.pid] = known if stated is None else max(stated / _GIB, known or 0.0)
    return tuple(GpuProcess(pid, gib) for pid, gib in used_gib.items())


def pids_of(uses: Sequence[GpuUse]) -> frozenset[int]:
    """Return the ids of all processes on the GPUs."""
    return frozenset(process.pid for use in uses for process in use.processes)


def _use(nvml: Any, name: str) -> GpuUse:
    try:
        handle = handle_of(nvml, name)
        try:
            memory, counts_reserve = nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2), False
        except nvml.NVMLError:
            memory, counts_reserve = nvml.nvmlDeviceGetMemoryInfo(handle), True
    except nvml.NVMLError as error:
        return GpuUse(name=name, fault=str(error))
    return GpuUse(
        name=name,
        used_gib=memory.used / _GIB,
        total_gib=memory.total / _GIB,
        counts_reserve=counts_reserve,
        processes=processes_on(nvml, handle),
    )
