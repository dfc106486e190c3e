"""Tells whether GPUs are as free after a trial as before it.

It asks the driver and never torch, which would itself use memory of a GPU.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any

import pynvml

RELEASE_S = 30.0
"""How long the driver may take to free the memory of ended processes, in seconds. Assumed."""
TOLERANCE_GIB = 0.25
"""How much more memory of a GPU may be in use after a job than before it. Assumed: more than the driver's own state
takes."""
_GIB = 1024**3
_POLL_S = 0.5
_ANSWER_S = 10.0
"""How long the driver may take to answer, in seconds. Assumed."""


@dataclass(frozen=True, slots=True)
class GpuSelection:
    """The GPUs of a job: the first `count` of those that are visible to it."""

    count: int
    """The number of GPUs; 0 on CPU."""
    visible_devices: str | None = None
    """The job's CUDA_VISIBLE_DEVICES; None if it is not set, so that the job sees every GPU."""

    def names(self) -> list[str]:
        """Return the index or the identifier of each GPU as a text; NVML must be initialised."""
        return visible(self.visible_devices, pynvml.nvmlDeviceGetCount())[: self.count]


@dataclass(frozen=True, slots=True)
class GpuUse:
    """How much memory of one GPU is in use, and by which processes."""

    name: str
    used_gib: float
    pids: tuple[int, ...] = ()


def gpus_in_use(selection: GpuSelection) -> tuple[GpuUse, ...]:
    """Return the memory use of each selected GPU, as the driver reports it; empty if the driver does not answer."""
    answers: list[tuple[GpuUse, ...]] = []
    if selection.count:  # in a thread, since the driver may wait for a broken GPU for ever
        thread = threading.Thread(target=lambda: answers.append(_ask(selection)), daemon=True)
        thread.start()
        thread.join(_ANSWER_S)
    return answers[0] if answers else ()


def _ask(selection: GpuSelection) -> tuple[GpuUse, ...]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_use(name) for name in selection.names())
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def wait_for_release(
    selection: GpuSelection, before: tuple[GpuUse, ...], limit_s: float = RELEASE_S
) -> tuple[str, ...]:
    """Wait until the GPUs are as free as in `before`, for at most about `limit_s` seconds.

    Returns:
        One line of text for each GPU that still has more memory in use at the limit; empty if all are free.
    """
    deadline_s = time.monotonic() + limit_s
    while before and (held := still_held(before, gpus_in_use(selection))):
        if time.monotonic() > deadline_s:
            return held
        time.sleep(_POLL_S)
    return ()


def still_held(before: tuple[GpuUse, ...], now: tuple[GpuUse, ...]) -> tuple[str, ...]:
    """Return one line of text for each GPU that has more memory in use than in `before`.

    The line says how much, and names the processes there.
    """
    if len(now) < len(before):
        return (f"the driver answers for {len(now)} GPUs, before the trial for {len(before)}",)
    return tuple(
        f"GPU {after.name} holds {after.used_gib:.2f} GiB, {earlier.used_gib:.2f} GiB before the trial "
        f"(processes: {', '.join(map(str, after.pids)) or 'none that the driver names'})"
        for earlier, after in zip(before, now, strict=True)
        if after.used_gib > earlier.used_gib + TOLERANCE_GIB
    )


def visible(visible_devices: str | None, count: int) -> list[str]:
    """Return the indices or identifiers that CUDA_VISIBLE_DEVICES names, in its order; if it is not set, all indices.

    `count` is the number of GPUs of the machine.
    """
    if visible_devices is None:
        return [str(index) for index in range(count)]
    return [name for part in visible_devices.split(",") if (name := part.strip())]


def handle_of(name: str) -> Any:
    """Return NVML's handle of a GPU, given by an index or identifier that `visible` returned."""
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _use(name: str) -> GpuUse:
    handle = handle_of(name)
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    used_gib = pynvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB
    return GpuUse(name, used_gib, tuple(process.pid for process in processes))
