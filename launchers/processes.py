"""Starts, finds and ends the processes of a job, and builds the environment that they inherit."""

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
"""The environment variable that holds the path of the trial's folder. The trial's processes are found by this marker,
even if they moved to another session or parent."""

STARTED_AT = "MEGATUNE_STARTED_AT"
"""The environment variable that holds the time when the launcher started the job, in seconds since the epoch."""

TORCHRUN = ("-P", "-m", "launchers.local.agent")
"""The arguments of `python` that start our torchrun, whose rendezvous listens on the loopback interface only."""

LOOPBACK: Mapping[str, str] = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment variables that make Gloo and NCCL listen on the loopback interface only. Without these, both choose the
first network interface."""

_FOREIGN_VARIABLES = ("TORCHELASTIC_", "PET_")
"""Prefixes of environment variables that torchrun sets. If the tuner itself runs under a torchrun, a job must not
inherit them, since the job's torchrun would read them."""

_KILL_S = 10.0
"""How long to wait for the end of a process after SIGKILL, in seconds. Assumed: one that lasts longer hangs in a
driver."""

_POLL_S = 0.05


def python_path() -> list[str]:
    """Return the entries of PYTHONPATH for child processes.

    The first is megatune's checkout, unless megatune is installed as a package. The rest is this process's PYTHONPATH.
    """
    root = Path(launchers.__file__).parents[1]
    # An installed package is found without help, and site-packages in front would hide the standard library.
    checkout = [] if root.name in {"site-packages", "dist-packages"} else [str(root)]
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return [*checkout, *(str(Path(entry).absolute()) for entry in inherited)]


def inherited_environment() -> dict[str, str]:
    """Return the environment that a job inherits: this process's, without variables of a torchrun that started it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_VARIABLES)}


def loopback_torchrun(ranks: int, name: str, log: Path) -> tuple[str, ...]:
    """Return the torchrun command that starts ranks on this machine; the caller appends the program and its arguments.

    Args:
        ranks: The number of ranks to start.
        name: The id of the rendezvous, which appears in torchrun's log.
        log: The folder for the ranks' output.
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
    """Return whether a process exists and is not a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _other_processes(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return the running processes of this machine for which `belongs` returns True, without this process."""
    belonging = []
    for pid in psutil.pids():  # psutil.process_iter has a cache that threads would share
        # Other users' processes cannot be read, and any process may end while it is looked at.
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if pid != os.getpid() and belongs(process) and is_running(process):
                belonging.append(process)
    return belonging


def marked_processes(folder: str) -> list[psutil.Process]:
    """Return the running processes of this machine whose environment variable MARKER is `folder` or a path below it."""
    return _other_processes(lambda process: _is_marked(process, folder))


def _is_marked(process: psutil.Process, folder: str) -> bool:
    marker = process.environ().get(MARKER)
    return marker is not None and Path(marker).is_relative_to(folder)


class RunningJob(Protocol):
    """All processes of a running job: its first process and everything that this one has started."""

    def ended(self) -> bool:
        """Return whether the job's first process has ended."""

    def end(self, grace_s: float) -> tuple[int, ...]:
        """End every process of the job by SIGTERM, and by SIGKILL after `grace_s` seconds; may be called again.

        Returns:
            The ids of the processes that even SIGKILL did not end, because they hang in a driver.
        """

    @property
    def exit_code(self) -> int | None:
        """The exit code of the job's first process, negative for a signal; may be None before `end` was called."""


class ColdJob:
    """A job that starts as a new process, and so imports all its modules again.

    The new process is a guard (`launchers.guard`), which runs the command, and ends it if the tuner dies. The job's
    processes are found in three ways: as descendants of the guard, as members of the guard's process group, and by the
    environment variable MARKER.
    """

    def __init__(self, argv: tuple[str, ...], env: Mapping[str, str], folder: Path, output: Path) -> None:
        """Start a command in a new session.

        Args:
            argv: The command line.
            env: The whole environment of the job; it has MARKER, and a PYTHONPATH that starts as `python_path` does.
            folder: The job's working directory.
            output: The file to which the job's stdout and stderr are appended.

        Raises:
            OSError: if the process cannot be started, or the output file cannot be written.
        """
        self._marker = env[MARKER]
        with output.open("ab") as file:
            self._guard = subprocess.Popen(
                (sys.executable, "-P", "-m", "launchers.guard", *argv),
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
        """See RunningJob: return whether the command has ended."""
        assert self._guard.stdout is not None
        if not self._has_ended and select.select([self._guard.stdout], [], [], 0)[0]:
            line = self._guard.stdout.readline()
            self._has_ended = True
            # A guard that was killed has written no exit code.
            self._exit_code = int(line) if line else self._guard.wait()
        return self._has_ended

    def end(self, grace_s: float) -> tuple[int, ...]:
        """See RunningJob: end the command and everything that it started.

        The guard is ended last: if the tuner dies during this call, the guard ends the job.
        """
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
        """See RunningJob: the command's exit code; the guard's if the guard was killed; None while the job runs."""
        return self._exit_code

    def _running(self) -> list[psutil.Process]:
        """Return the job's running processes, except the guard."""
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
    """End the running processes whose marker is `folder` or a path below it: those that a killed tuner left behind.

    Args:
        folder: The path of a trial's folder, or of a sweep's folder for the processes of all its trials.
        grace_s: The time between SIGTERM and SIGKILL, in seconds.

    Returns:
        The ids of the processes that even SIGKILL did not end.
    """
    return tuple(process.pid for process in end_processes(lambda: marked_processes(folder), grace_s))


def end_processes(find: Callable[[], list[psutil.Process]], grace_s: float) -> list[psutil.Process]:
    """End the processes that `find` returns, until it returns none: by SIGTERM, and by SIGKILL after `grace_s` seconds.

    Returns:
        The processes that still run; empty unless some outlast SIGKILL.
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
