"""Reads what the machine does at one moment: a GPU through NVML, a CPU through the kernel's counters."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import psutil
import pynvml

from launchers.processes import MARKER
from launchers.watch.gpus import GpuSelection, handle_of
from tuner.trial.contract import Phase

_GIB = 1024**3

_THROTTLE_REASONS: Mapping[str, int] = {
    "SwPowerCap": 0x4,
    "HwSlowdown": 0x8,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
}
"""Bits of NVML's nvmlClocksEventReasons, by name. Published: nvml.h. Reasons that are harmless are left out: an idle
GPU, clocks that a user set, and a display's clocks."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """One reading of a GPU; a field is None if the driver does not report it."""

    clock_mhz: float | None
    """Clock of the streaming multiprocessors (SM)."""
    power_w: float | None
    energy_j: float | None
    """Energy used since the driver was loaded."""
    temperature_c: float | None
    throttle_reasons: tuple[str, ...]
    """NVML's names of the reasons for which the clock is lowered."""
    foreign_memory_gib: float | None
    """GPU memory used by processes that do not belong to the trial; None if it cannot be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuReading:
    """One reading of the cores that the trial may use."""

    clock_mhz: float | None
    """Mean clock of the cores."""
    busy_s: float
    """Busy time of all the cores together since the machine started, in seconds, including steal time, which the host
    of a virtual machine takes away."""
    own_s: float | None
    """CPU time, in seconds, of the trial's processes and of the tuner with its children; None outside the timed steps,
    and once one of these processes has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was read of the machine at one moment."""

    time_s: float
    """Seconds since the epoch."""
    phase: Phase
    """The trial's phase."""
    gpus: tuple[GpuReading, ...] = ()
    """One reading for each GPU of the trial."""
    cpu: CpuReading | None = None
    """The reading of the cores; None if the trial has GPUs."""


class Meter(Protocol):
    """Reads the machine."""

    def read(self, phase: Phase) -> Sample:
        """Read the machine once, while the trial is in `phase`."""


class OwnProcesses:
    """Tells the trial's processes and the tuner's from all others.

    The environment of a trial's processes has a marker, the path of the trial's folder. A forked rank shows the marker
    of the process that it was forked from: the sweep's folder, which contains the trial's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_own: dict[int, bool] = {}
        """For the ids of processes that were asked about before: whether the process is the trial's or the tuner."""

    def holds(self, pid: int) -> bool:
        """Return whether the process with this id is one of the trial's or the tuner itself."""
        if pid not in self._is_own:
            self._is_own[pid] = pid == os.getpid() or self._is_marked(pid)
        return self._is_own[pid]

    def processes(self) -> list[psutil.Process]:
        """Return the trial's processes that run now, the tuner, and the tuner's descendants."""
        tuner = psutil.Process()
        processes = {tuner, *tuner.children(recursive=True)}
        for pid in psutil.pids():
            with suppress(psutil.Error):
                if self._is_marked(pid):
                    processes.add(psutil.Process(pid))
        return list(processes)

    def _is_marked(self, pid: int) -> bool:
        try:
            marker = psutil.Process(pid).environ().get(MARKER)
        except (psutil.Error, OSError):  # it belongs to another user, has ended, or is outside our container
            return False
        return marker is not None and self._folder.is_relative_to(marker)


class CpuMeter:
    """Reads the cores that this process, and so the trial, may use."""

    def __init__(self, own_processes: OwnProcesses) -> None:
        self._own_processes = own_processes
        self._cores = sorted(os.sched_getaffinity(0))
        self._processes: list[psutil.Process] = []

    def read(self, phase: Phase) -> Sample:
        """Read the cores once, while the trial is in `phase`."""
        if phase == "measure" and not self._processes:
            # All ranks run now. They are looked up once, because that reads every process of the machine.
            self._processes = self._own_processes.processes()
        own_s = self._own_s() if phase == "measure" else None
        cpu = CpuReading(clock_mhz=self._clock_mhz(), busy_s=self._busy_s(), own_s=own_s)
        return Sample(time_s=time.time(), phase=phase, cpu=cpu)

    def _busy_s(self) -> float:
        # Interrupts are left out: the kernel charges them to no process, and the ranks' own messages cause most.
        times = psutil.cpu_times(percpu=True)
        chosen = [times[core] for core in self._cores if core < len(times)]
        return sum(each.user + each.nice + each.system + getattr(each, "steal", 0.0) for each in chosen)

    def _own_s(self) -> float | None:
        total_s = 0.0
        try:
            for process in self._processes:
                times = process.cpu_times()
                total_s += times.user + times.system
        except psutil.Error:  # a process has ended, and its CPU time can no longer be read
            return None
        return total_s

    def _clock_mhz(self) -> float | None:
        clocks = psutil.cpu_freq(percpu=True) or []
        chosen = [clocks[core].current for core in self._cores if core < len(clocks)]
        return fmean(chosen) if chosen else None


class GpuMeter:
    """Reads the GPUs of the trial; NVML must be initialised."""

    def __init__(self, selection: GpuSelection, own_processes: OwnProcesses) -> None:
        self._handles = [handle_of(name) for name in selection.names()]
        self._own_processes = own_processes

    def read(self, phase: Phase) -> Sample:
        """Read the trial's GPUs once, while the trial is in `phase`."""
        readings = tuple(read_gpu(pynvml, handle, self._own_processes.holds) for handle in self._handles)
        return Sample(time_s=time.time(), phase=phase, gpus=readings)


def read_gpu(nvml: Any, handle: Any, is_own: Callable[[int], bool]) -> GpuReading:
    """Return one reading of a GPU.

    Args:
        nvml: The module pynvml, or an object with its functions.
        handle: NVML's handle of the GPU.
        is_own: Returns whether the process with this id belongs to the trial.
    """

    def answer_of(ask: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return ask(handle, *arguments)
        except nvml.NVMLError:  # the GPU, a slice of one, or the driver does not report this
            return None

    milliwatts = answer_of(nvml.nvmlDeviceGetPowerUsage)
    millijoules = answer_of(nvml.nvmlDeviceGetTotalEnergyConsumption)
    reasons = answer_of(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
    return GpuReading(
        clock_mhz=answer_of(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        power_w=None if milliwatts is None else milliwatts / 1000,
        energy_j=None if millijoules is None else millijoules / 1000,
        temperature_c=answer_of(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=tuple(name for name, bit in _THROTTLE_REASONS.items() if reasons & bit),
        foreign_memory_gib=_foreign_gib(answer_of(nvml.nvmlDeviceGetComputeRunningProcesses) or [], is_own),
    )


def _foreign_gib(processes: Sequence[Any], is_own: Callable[[int], bool]) -> float | None:
    """Return the GPU memory in GiB of processes that do not belong to the trial; None if no process belongs to it.

    In that case no rank uses the GPU yet, or a container hides the ranks' process ids, so that a rank would count as
    foreign.
    """
    foreign = [process for process in processes if not is_own(process.pid)]
    if len(foreign) == len(processes):
        return None
    return sum(process.usedGpuMemory or 0 for process in foreign) / _GIB
