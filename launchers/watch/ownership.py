"""Tells whose a process is: the trial's, the tuner's, or somebody else's."""

import os
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import psutil

from launchers.processes import MARKER

_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC
"""The inode of the first PID namespace, in which every process of the machine can be seen. Published: PROC_PID_INIT_INO
in the kernel's include/linux/proc_ns.h."""


@cache
def sees_all_processes() -> bool:
    """Return whether every process of the machine can be seen from here; in most containers it cannot.

    NVML names a process by its id on the machine, which says nothing in a PID namespace with ids of its own.
    """
    with suppress(OSError):
        return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE
    return False


class OwnProcesses:
    """Tells the trial's processes and the tuner's from all others.

    The environment of a trial's processes has a marker, the path of the trial's folder. A forked rank shows the marker
    of the process that it was forked from: the sweep's folder, which contains the trial's.

    Args:
        folder: The trial's folder; None if no trial runs, so that only the tuner's processes are own.
        earlier: Ids of the processes that used the trial's GPUs before it began.
    """

    def __init__(self, folder: Path | None = None, earlier: Collection[int] = ()) -> None:
        self._folder, self._earlier = folder, frozenset(earlier)
        self._is_own: dict[int, bool] = {}
        """For the ids of processes that were asked about before: whether the process is the trial's or the tuner."""

    def holds(self, pid: int) -> bool:
        """Return whether the process with this id is one of the trial's or the tuner itself."""
        if pid not in self._is_own:
            self._is_own[pid] = pid == os.getpid() or self._is_marked(pid)
        return self._is_own[pid]

    def excludes(self, pid: int) -> bool:
        """Return whether the process with this id is certainly somebody else's.

        It is if it used a GPU before the trial began, or if it runs without the marker where all processes are seen.
        """
        if self.holds(pid):
            return False
        return pid in self._earlier or (sees_all_processes() and _runs(pid))

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
        return marker is not None and self._folder is not None and self._folder.is_relative_to(marker)


def _runs(pid: int) -> bool:
    """Return whether a process with this id runs, under whatever user; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):  # it exists, and its user hides it
        return True
