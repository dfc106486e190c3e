"""Reads what the machine does at one moment: a GPU through NVML, a CPU through the kernel's counters."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol, TypeVar

import psutil

from launchers.watch.gpus import GpuProcess, GpuSelection, handle_of, names_of, processes_on
from launchers.watch.ownership import OwnProcesses
from tuner.trial.contract import Phase

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
    """Reads the GPUs of the trial.

    Args:
        nvml: The module pynvml, or an object with its functions; it must be open.
        selection: The GPUs of the trial.
        own_processes: Tells the trial's processes from others.
    """

    def __init__(self, nvml: Any, selection: GpuSelection, own_processes: OwnProcesses) -> None:
        self._nvml, self._own_processes = nvml, own_processes
        self._handles = [handle_of(nvml, name) for name in names_of(nvml, selection)]

    def read(self, phase: Phase) -> Sample:
        """Read the trial's GPUs once, while the trial is in `phase`."""
        readings = tuple(read_gpu(self._nvml, handle, self._own_processes) for handle in self._handles)
        return Sample(time_s=time.time(), phase=phase, gpus=readings)


def read_gpu(nvml: Any, handle: Any, own_processes: OwnProcesses) -> GpuReading:
    """Return one reading of a GPU.

    Args:
        nvml: The module pynvml, or an object with its functions.
        handle: NVML's handle of the GPU.
        own_processes: Tells the trial's processes from others.
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
        foreign_memory_gib=_foreign_gib(processes_on(nvml, handle), own_processes),
    )


def most_foreign_gib(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Return the most memory in GiB of each GPU that others were seen to hold; 0 for a GPU of which none was seen."""
    readings = zip(*(sample.gpus for sample in samples), strict=True)
    return tuple(max(reading.foreign_memory_gib or 0.0 for reading in of_gpu) for of_gpu in readings)


def _foreign_gib(processes: Sequence[GpuProcess], own_processes: OwnProcesses) -> float | None:
    """Return the GPU memory in GiB of processes that do not belong to the trial; None if it cannot be told.

    If a process belongs to the trial, all others do not. If none does, either no rank uses the GPU yet, or a container
    hides whose the processes are: then only those count that are certainly not the trial's.
    """
    foreign = [process for process in processes if not own_processes.holds(process.pid)]
    if len(foreign) == len(processes):
        foreign = [process for process in processes if own_processes.excludes(process.pid)]
        if not foreign:
            return None
    return sum(process.used_gib or 0.0 for process in foreign)
