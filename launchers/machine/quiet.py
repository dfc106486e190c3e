"""Waits, for a bounded time, until other processes leave the CPU cores of this machine free for a measurement."""

import os
import threading
import time
from collections.abc import Callable

from launchers.watch.meters import CpuMeter
from launchers.watch.ownership import OwnProcesses
from launchers.watch.telemetry import FOREIGN_LOAD, summarise

PATIENCE_S = 60.0
"""The longest wait for other processes to end, in seconds. Assumed: a build or a test run may end in this time, and the
user accepts such a wait."""
_WINDOW_S = 1.0
"""The time over which the load of the cores is averaged, in seconds. Assumed."""


def foreign_load(stop: threading.Event) -> float:
    """Return the mean number of cores that other processes keep busy, measured over the next `_WINDOW_S` seconds.

    The measurement ends early if `stop` is set.
    """
    meter = CpuMeter(OwnProcesses())
    first = meter.read("measure")
    stop.wait(_WINDOW_S)
    telemetry = summarise((first, meter.read("measure")), None)
    return 0.0 if telemetry is None or telemetry.foreign_load is None else telemetry.foreign_load


def wait_for_quiet(stop: threading.Event, on_wait: Callable[[str], None]) -> None:
    """Wait until other processes keep at most a share FOREIGN_LOAD of the cores busy, for at most PATIENCE_S seconds.

    Args:
        stop: Ends the wait when it is set.
        on_wait: Called with a sentence for the user when the wait begins, and again if PATIENCE_S passes in vain.
    """
    cores = len(os.sched_getaffinity(0))
    load = foreign_load(stop)
    if load <= FOREIGN_LOAD * cores:
        return
    on_wait(f"{_busy(load, cores)}: waiting up to {PATIENCE_S:.0f} s for them")
    deadline_s = time.monotonic() + PATIENCE_S
    while load > FOREIGN_LOAD * cores and time.monotonic() < deadline_s and not stop.is_set():
        load = foreign_load(stop)
    if load > FOREIGN_LOAD * cores and not stop.is_set():
        on_wait(f"{_busy(load, cores)}: measuring nevertheless")


def _busy(load: float, cores: int) -> str:
    return f"other processes keep {load:.1f} of {cores} cores busy"
