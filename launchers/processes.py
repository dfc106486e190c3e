"""Processes and who owns them: how a job's processes are started, found and ended, and what they inherit."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

import launchers

MARKER = "MEGATUNE_TRIAL"
"""The environment variable that holds the trial's folder, by which its processes are found wherever they moved."""

STARTED_AT = "MEGATUNE_STARTED_AT"
"""The environment variable that tells a program when its launcher began, in seconds since the epoch."""

TORCHRUN = ("-m", "launchers.local.agent")
"""What follows `python` on the command line of torchrun with a rendezvous that listens on loopback alone."""

LOOPBACK: Mapping[str, str] = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""The variables by which Gloo and NCCL listen on loopback alone. Both would choose the first network interface."""

_FOREIGN_VARIABLES = ("TORCHELASTIC_", "PET_")
"""Prefixes of variables that a torchrun which started the tuner has set; our torchrun would take them as its own."""

_KILL_S = 10.0
"""How long the kernel gets to take away a killed process. Assumed: one that stays longer hangs in a driver."""

_POLL_S = 0.05


def python_path() -> list[str]:
    """Return the entries of PYTHONPATH for children: our packages when they run from a checkout, then the user's."""
    root = Path(launchers.__file__).parents[1]
    # An installed package is found without help, and site-packages in front would hide the standard library.
    checkout = [] if root.name in {"site-packages", "dist-packages"} else [str(root)]
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return [*checkout, *(str(Path(entry).absolute()) for entry in inherited)]


def inherited_environment() -> dict[str, str]:
    """Return our own environment as a job inherits it, without the variables of another torchrun."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_VARIABLES)}


def loopback_torchrun(ranks: int, name: str, log: Path) -> tuple[str, ...]:
    """Return the command line that starts `ranks` ranks on this machine under torchrun, up to the program's name.

    Args:
        ranks: How many processes to start.
        name: The rendezvous's id, which torchrun's log names.
        log: The folder of the ranks' output.
    """
    return (
        sys.executable,
        *TORCHRUN,
        "--nnodes=1",
        f"--nproc-per-node={ranks}",
        "--max-restarts=0",
        "--rdzv-backend=loopback",
        "--rdzv-endpoint=127.0.0.1:0",
        f"--rdzv-id={name}",
        "--local-addr=127.0.0.1",
        f"--log-dir={log}",
        "--redirects=3",
    )


def is_running(process: psutil.Process) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _other_processes(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return the running processes of this machine, except this process, that `belongs` holds for."""
    belonging = []
    for pid in psutil.pids():  # psutil.process_iter has a cache that threads would share
        # Other users' processes cannot be read, and any process may end while it is looked at.
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if pid != os.getpid() and belongs(process) and is_running(process):
                belonging.append(process)
    return belonging


def marked_processes(folder: str) -> list[psutil.Process]:
    """Return the running processes of this machine whose marker is `folder` or a folder in it."""
    return _other_processes(lambda process: _is_marked(process, folder))


def _is_marked(process: psutil.Process, folder: str) -> bool:
    marker = process.environ().get(MARKER)
    return marker is not None and Path(marker).is_relative_to(folder)


class RunningJob(Protocol):
    """The processes of one trial, the whole tree of them."""

    def ended(self) -> bool:
        """Return whether the first process has ended."""

    def end(self, grace_s: float) -> tuple[int, ...]:
        """End every process by SIGTERM, and by SIGKILL after `grace_s`; may be called again.

        Returns:
            The ids of the processes that even SIGKILL did not end: those that hang in a driver.
        """

    @property
    def exit_code(self) -> int | None:
        """The first process's exit code, negative for a signal; None before `end`."""


class ColdJob:
    """A job that starts as a new process and imports everything anew.

    The process is a guard (`launchers.guard`), which runs the command and ends it if this process dies. The job's
    processes are found in three ways: as descendants of the guard, as members of its process group, and by the marker.
    """

    def __init__(self, argv: tuple[str, ...], env: Mapping[str, str], folder: Path, output: Path) -> None:
        """Start `argv` in `folder`, in a session of its own, with its output appended to `output`; raises OSError.

        `env` must hold the marker, and a PYTHONPATH that starts with the entries of `python_path`.
        """
        self._marker = env[MARKER]
        with output.open("ab") as file:
            self._guard = subprocess.Popen(
                (sys.executable, "-m", "launchers.guard", *argv),
                cwd=folder,
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self._exit_code: int | None = None
        self._has_ended = False

    def ended(self) -> bool:
        """Return whether the command has ended."""
        assert self._guard.stdout is not None
        if not self._has_ended and select.select([self._guard.stdout], [], [], 0)[0]:
            line = self._guard.stdout.readline()
            self._has_ended = True
            # A guard that was killed has said nothing.
            self._exit_code = int(line) if line else self._guard.wait()
        return self._has_ended

    def end(self, grace_s: float) -> tuple[int, ...]:
        """See RunningJob. The guard is ended last, since it is what ends the job if this process dies meanwhile."""
        survivors = end_processes(self._running, grace_s)
        self.ended()
        self._guard.kill()
        self._guard.wait()
        for pipe in (self._guard.stdin, self._guard.stdout):
            assert pipe is not None
            pipe.close()
        return tuple(process.pid for process in survivors)

    @property
    def exit_code(self) -> int | None:
        """See RunningJob."""
        return self._exit_code

    def _running(self) -> list[psutil.Process]:
        """Return the job's running processes without the guard."""
        guard = self._guard.pid
        if self._guard.returncode is not None:
            return marked_processes(self._marker)
        descendants: set[psutil.Process] = set()
        with suppress(psutil.Error):
            descendants.update(psutil.Process(guard).children(recursive=True))
        return _other_processes(
            lambda process: (
                process.pid != guard
                and (
                    process in descendants
                    or os.getpgid(process.pid) == guard
                    or _is_marked(process, self._marker)
                )
            )
        )


def end_marked(folder: str, grace_s: float) -> tuple[int, ...]:
    """End what a killed launcher has left running for the trial of a folder, or for any trial of a sweep's folder.

    Returns:
        The ids of the processes that even SIGKILL did not end.
    """
    return tuple(process.pid for process in end_processes(lambda: marked_processes(folder), grace_s))


def end_processes(find: Callable[[], list[psutil.Process]], grace_s: float) -> list[psutil.Process]:
    """End the processes that `find` returns until it returns none: by SIGTERM, and by SIGKILL after `grace_s`.

    Returns:
        The processes that still run.
    """
    running = find()
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_S)):
        deadline_s = time.monotonic() + patience_s
        signalled: set[psutil.Process] = set()
        # The processes are looked up each time, since one may be started while the others are ended.
        while running and time.monotonic() < deadline_s:
            for process in set(running) - signalled:
                with suppress(psutil.Error):
                    process.send_signal(number)
            signalled.update(running)
            time.sleep(_POLL_S)
            running = find()
    return running
