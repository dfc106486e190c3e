"""What the machine does while a trial runs: sampled beside it, and summed up over its timed steps.

A GPU tells of itself through NVML, a CPU through the kernel's counters. Whether the machine was throttled or shared is
decided from the sums, by thresholds that stand here with their reasons.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import psutil
import pynvml

from launchers.processes import MARKER
from launchers.watch import gpus
from tuner.files import to_data
from tuner.trial.contract import Phase, Telemetry, TrialFolder

MOST_SAMPLES = 2000
"""What a trial's samples are spread out to over its time limit, so that their file stays below 2 MB."""
MOST_SHARE = 0.01
"""The share of a core that sampling may take."""
LEAST_WINDOW_S = 0.5
"""What load and power are averaged over at least: the kernel counts a process's time in ticks of 10 ms."""
FOREIGN_MEMORY_GIB = 0.1
"""Less than the smallest CUDA context, so that one foreign process on a GPU shows, and more than an MPS server."""
FOREIGN_LOAD = 0.1
"""The share of the cores: the ranks claim all of them, so that what others take is missing. The daemons and
kernel threads of a machine that is otherwise idle take less than a tenth of that."""

_SPARSE_S, _DENSE_S = 1.0, 0.1
_DENSE_SHARE = 0.05
"""While steps are timed, the next sample comes after this share of the time since they began."""
_TICK_S = 0.1
_END_S = 2.0
"""How long the thread gets to end; one that waits for a broken GPU is left behind."""
_GIB = 1024**3

# nvml.h, nvmlClocksEventReasons. Idle, clocks that a user set and a display's are left out: they are no trouble.
_THROTTLE_REASONS: Mapping[str, int] = {
    "SwPowerCap": 0x4,
    "HwSlowdown": 0x8,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
}
_USUAL_REASONS = frozenset({"SwPowerCap", "SyncBoost"})
"""A GPU at its power limit is how large matrix products run on a sound machine; boosting together is a setting."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One reading of a GPU; None is what its driver does not tell."""

    clock_mhz: float | None
    power_w: float | None
    energy_j: float | None
    """Since the driver was loaded."""
    temperature_c: float | None
    throttle_reasons: tuple[str, ...]
    foreign_memory_gib: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """One reading of the cores that the trial may use."""

    clock_mhz: float | None
    """Their mean."""
    busy_s: float
    """What they were busy since the machine started, all together; for a virtual machine with what others took."""
    own_s: float | None
    """What the trial's processes and the tuner were; None before steps are timed, and once one has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at the machine."""

    time_s: float
    """Seconds since the epoch."""
    phase: Phase
    gpus: tuple[Gpu, ...] = ()
    cpu: Cpu | None = None


class Meter(Protocol):
    """Reads the machine."""

    def read(self, phase: Phase) -> Sample:
        """Look once."""


class Sampler:
    """Samples in a thread of its own, since NVML may wait for a broken GPU for ever.

    Args:
        folder: The trial's, where the samples are kept.
        gpu_count: How many GPUs the trial uses; 0 on CPU.
        trial_s: The trial's time limit.
        phase: Tells where the trial is.
    """

    def __init__(
        self, folder: TrialFolder, gpu_count: int, trial_s: float, phase: Callable[[], Phase]
    ) -> None:
        self._folder, self._gpu_count, self._phase = folder, gpu_count, phase
        self._sparse_s = max(_SPARSE_S, trial_s / MOST_SAMPLES)
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> tuple[Sample, ...]:
        """End, and return the samples. May be called again."""
        self._over.set()
        self._thread.join(_END_S)
        return tuple(self._samples)

    def _run(self) -> None:
        ours = Ours(self._folder.path)
        # Without a driver, or its right, a trial goes on: it only tells less.
        with suppress(pynvml.NVMLError, psutil.Error, OSError):
            if not self._gpu_count:
                self._watch(CpuMeter(ours))
                return
            pynvml.nvmlInit()
            try:
                self._watch(GpuMeter(self._gpu_count, ours))
            finally:
                pynvml.nvmlShutdown()

    def _watch(self, meter: Meter) -> None:
        seen: Phase | None = None
        since_s = due_s = 0.0
        with self._folder.telemetry.open("w", encoding="utf-8") as file:
            while not self._over.wait(_TICK_S):
                phase, now_s = self._phase(), time.monotonic()
                if phase != seen:
                    seen, since_s, due_s = phase, now_s, now_s
                if now_s < due_s:
                    continue
                began_s = time.thread_time()
                sample = meter.read(phase)
                self._samples.append(sample)
                file.write(json.dumps(to_data(sample)) + "\n")
                file.flush()
                cost_s = time.thread_time() - began_s
                due_s = now_s + pause_s(phase, now_s - since_s, cost_s, self._sparse_s)


def pause_s(phase: Phase, since_s: float, cost_s: float, sparse_s: float) -> float:
    """How long until the next sample: finer at the start of the timed steps, and never above its share of a core."""
    fine_s = max(_DENSE_S, _DENSE_SHARE * since_s)
    wanted_s = min(fine_s, sparse_s) if phase == "measure" else sparse_s
    return max(wanted_s, cost_s / MOST_SHARE)


class Ours:
    """Tells the trial's processes from all others by the marker in their environment; the tuner and its own are ours.

    A forked rank shows that of the process it was forked from: the sweep's, above the trial's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, bool] = {}

    def holds(self, pid: int) -> bool:
        """Whether a process is ours."""
        if pid not in self._known:
            self._known[pid] = pid == os.getpid() or self._is_marked(pid)
        return self._known[pid]

    def processes(self) -> list[psutil.Process]:
        """Those that run now."""
        tuner = psutil.Process()
        found = {tuner, *tuner.children(recursive=True)}
        for pid in psutil.pids():
            with suppress(psutil.Error):
                if self._is_marked(pid):
                    found.add(psutil.Process(pid))
        return list(found)

    def _is_marked(self, pid: int) -> bool:
        try:
            marker = psutil.Process(pid).environ().get(MARKER)
        except (psutil.Error, OSError):  # another user's, or ended, or outside our container
            return False
        return marker is not None and self._folder.is_relative_to(marker)


class CpuMeter:
    """Reads the cores that this process, and so the trial, may use."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self._cores = sorted(os.sched_getaffinity(0))
        self._processes: list[psutil.Process] = []

    def read(self, phase: Phase) -> Sample:
        """See Meter."""
        if phase == "measure" and not self._processes:
            self._processes = (
                self._ours.processes()
            )  # costs a look at every process: once, when all ranks are there
        own_s = self._own_s() if phase == "measure" else None
        cpu = Cpu(clock_mhz=self._clock_mhz(), busy_s=self._busy_s(), own_s=own_s)
        return Sample(time_s=time.time(), phase=phase, cpu=cpu)

    def _busy_s(self) -> float:
        # Without interrupts: no process is told apart in them, and the ranks' own messages make most.
        times = psutil.cpu_times(percpu=True)
        chosen = [times[core] for core in self._cores if core < len(times)]
        return sum(each.user + each.nice + each.system + getattr(each, "steal", 0.0) for each in chosen)

    def _own_s(self) -> float | None:
        total_s = 0.0
        try:
            for process in self._processes:
                times = process.cpu_times()
                total_s += times.user + times.system
        except psutil.Error:  # ended, with all that it counted
            return None
        return total_s

    def _clock_mhz(self) -> float | None:
        clocks = psutil.cpu_freq(percpu=True) or []
        chosen = [clocks[core].current for core in self._cores if core < len(clocks)]
        return fmean(chosen) if chosen else None


class GpuMeter:
    """Reads the GPUs that the trial's ranks see, the first `count`; NVML must be initialised."""

    def __init__(self, count: int, ours: Ours) -> None:
        names = gpus.visible(os.environ.get("CUDA_VISIBLE_DEVICES"), pynvml.nvmlDeviceGetCount())
        self._handles = [gpus.handle_of(name) for name in names[:count]]
        self._ours = ours

    def read(self, phase: Phase) -> Sample:
        """See Meter."""
        readings = tuple(read_gpu(pynvml, handle, self._ours.holds) for handle in self._handles)
        return Sample(time_s=time.time(), phase=phase, gpus=readings)


def read_gpu(nvml: Any, handle: Any, is_ours: Callable[[int], bool]) -> Gpu:
    """Ask for all of one GPU; `nvml` has the functions of pynvml."""

    def told(ask: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return ask(handle, *arguments)
        except nvml.NVMLError:  # this GPU, a slice of one, or this driver has it not
            return None

    milliwatts = told(nvml.nvmlDeviceGetPowerUsage)
    millijoules = told(nvml.nvmlDeviceGetTotalEnergyConsumption)
    reasons = told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
    return Gpu(
        clock_mhz=told(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        power_w=None if milliwatts is None else milliwatts / 1000,
        energy_j=None if millijoules is None else millijoules / 1000,
        temperature_c=told(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=tuple(name for name, bit in _THROTTLE_REASONS.items() if reasons & bit),
        foreign_memory_gib=_foreign_gib(told(nvml.nvmlDeviceGetComputeRunningProcesses) or [], is_ours),
    )


def _foreign_gib(processes: Sequence[Any], is_ours: Callable[[int], bool]) -> float | None:
    """What processes other than ours hold; None where ours is not among them.

    Then no rank is there yet, or a container hides who is who, and a rank would pass for a foreign process.
    """
    foreign = [process for process in processes if not is_ours(process.pid)]
    if len(foreign) == len(processes):
        return None
    return sum(process.usedGpuMemory or 0 for process in foreign) / _GIB


def summarise(samples: Sequence[Sample], tokens_per_s: float | None) -> Telemetry | None:
    """What the samples say of the timed steps; None where no sample fell among them.

    `tokens_per_s` is all GPUs' together, of a completed trial.
    """
    timed = [sample for sample in samples if sample.phase == "measure"]
    if not timed:
        return None
    readings = [gpu for sample in timed for gpu in sample.gpus]
    reasons = {reason for gpu in readings for reason in gpu.throttle_reasons}
    clocks = _known(
        [gpu.clock_mhz for gpu in readings] + [sample.cpu.clock_mhz for sample in timed if sample.cpu]
    )
    power_w = _power_w(timed)
    return Telemetry(
        samples=len(timed),
        power_w=power_w,
        energy_j_per_token=power_w / tokens_per_s if power_w is not None and tokens_per_s else None,
        clock_mhz=fmean(clocks) if clocks else None,
        lowest_clock_mhz=min(clocks, default=None),
        temperature_c=max(_known(gpu.temperature_c for gpu in readings), default=None),
        throttle_reasons=tuple(sorted(reasons)),
        foreign_memory_gib=max(_known(gpu.foreign_memory_gib for gpu in readings), default=None),
        foreign_load=_foreign_load(timed),
    )


def suspicions(telemetry: Telemetry, cores: int) -> tuple[str, ...]:
    """Why what was measured meanwhile is not to be trusted, a line each; `cores` are those that the trial shares."""
    found = []
    if reasons := [name for name in telemetry.throttle_reasons if name not in _USUAL_REASONS]:
        heat = "" if telemetry.temperature_c is None else f", at up to {telemetry.temperature_c:.0f} °C"
        found.append(f"a GPU was throttled while steps were timed: {', '.join(reasons)}{heat}")
    if (held_gib := telemetry.foreign_memory_gib) is not None and held_gib > FOREIGN_MEMORY_GIB:
        found.append(f"other processes held {held_gib:.1f} GiB of a GPU while steps were timed")
    if (load := telemetry.foreign_load) is not None and load > FOREIGN_LOAD * cores:
        found.append(
            f"other processes kept {load:.1f} of {cores} cores busy while steps were timed, "
            f"more than {FOREIGN_LOAD:.0%}"
        )
    return tuple(found)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _power_w(timed: Sequence[Sample]) -> float | None:
    """Mean of all GPUs together: by their energy counters, else by the readings, which lag by up to a second."""
    if not timed[0].gpus:
        return None
    window_s = timed[-1].time_s - timed[0].time_s
    used = [
        (last.energy_j - first.energy_j) / window_s
        for first, last in zip(timed[0].gpus, timed[-1].gpus, strict=True)
        if window_s >= LEAST_WINDOW_S and first.energy_j is not None and last.energy_j is not None
    ]
    if len(used) == len(timed[0].gpus):
        return sum(used)
    told = [[gpu.power_w for gpu in sample.gpus] for sample in timed]
    sums = [sum(_known(powers)) for powers in told if None not in powers]
    return fmean(sums) if sums else None


def _foreign_load(timed: Sequence[Sample]) -> float | None:
    told = [
        (sample.time_s, sample.cpu.busy_s, sample.cpu.own_s)
        for sample in timed
        if sample.cpu is not None and sample.cpu.own_s is not None
    ]
    if len(told) < 2 or told[-1][0] - told[0][0] < LEAST_WINDOW_S:
        return None
    window_s, busy_s, own_s = (last - first for first, last in zip(told[0], told[-1], strict=True))
    return max(0.0, (busy_s - own_s) / window_s)
