"""GPUs as free after a trial as before it: asked of the driver, never of torch, which would take memory itself."""

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import pynvml

RELEASE_S = 30.0
"""How long the driver may take to give back what ended processes held."""
TOLERANCE_GIB = 0.25
"""What a GPU's use may grow by without a process of ours: the driver's own state."""
_GIB = 1024**3
_POLL_S = 0.5
_ANSWER_S = 10.0
"""How long the driver may take to answer."""


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What is held of one GPU, and by whom."""

    name: str
    used_gib: float
    pids: tuple[int, ...] = ()


def gpus_in_use(count: int) -> tuple[GpuUse, ...]:
    """Ask for the first `count` GPUs that a job sees; nothing where the driver does not answer."""
    answers: list[tuple[GpuUse, ...]] = []
    if count:  # in a thread, since the driver may wait for a broken GPU for ever
        thread = threading.Thread(target=lambda: answers.append(_ask(count)), daemon=True)
        thread.start()
        thread.join(_ANSWER_S)
    return answers[0] if answers else ()


def _ask(count: int) -> tuple[GpuUse, ...]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        names = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), pynvml.nvmlDeviceGetCount())
        return tuple(_use(name) for name in names[:count])
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def wait_for_release(before: tuple[GpuUse, ...], limit_s: float = RELEASE_S) -> tuple[str, ...]:
    """Wait until the GPUs are as free as they were; returns a line for each that is not within `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while before and (held := still_held(before, gpus_in_use(len(before)))):
        if time.monotonic() > deadline_s:
            return held
        time.sleep(_POLL_S)
    return ()


def still_held(before: tuple[GpuUse, ...], now: tuple[GpuUse, ...]) -> tuple[str, ...]:
    """Say which GPUs are fuller than they were, by how much, and whose processes are there."""
    if len(now) < len(before):
        return (f"the driver answers for {len(now)} GPUs, before the trial for {len(before)}",)
    return tuple(
        f"GPU {after.name} holds {after.used_gib:.2f} GiB, {earlier.used_gib:.2f} GiB before the trial "
        f"(processes: {', '.join(map(str, after.pids)) or 'none that the driver names'})"
        for earlier, after in zip(before, now, strict=True)
        if after.used_gib > earlier.used_gib + TOLERANCE_GIB
    )


def visible(selected: str | None, count: int) -> list[str]:
    """The indices or identifiers of CUDA_VISIBLE_DEVICES in its order, else every index."""
    if selected is None:
        return [str(index) for index in range(count)]
    return [name for part in selected.split(",") if (name := part.strip())]


def handle_of(name: str) -> Any:
    """NVML's handle of a GPU that `visible` names."""
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _use(name: str) -> GpuUse:
    handle = handle_of(name)
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    used_gib = pynvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB
    return GpuUse(name, used_gib, tuple(process.pid for process in processes))
