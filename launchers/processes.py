"""What every launcher shares: the plan of a trial's job, its time limits, and who owns its processes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

import launchers

MARKER = "MEGATUNE_TRIAL"
"""The environment variable by which a trial's processes are known wherever they moved: its folder."""

STARTED_AT = "MEGATUNE_STARTED_AT"
"""The environment variable that tells a program when its launcher began, in seconds since the epoch."""


_FOREIGN_VARIABLES = ("TORCHELASTIC_", "PET_")
"""Prefixes of what another torchrun around us would pass to ours."""


_KILL_S = 10.0
"""How long the kernel gets to take away a killed process; one that stays longer hangs in a driver."""


def python_path() -> list[str]:
    """Where the children find our packages when they run from a checkout; the user's own entries stay."""
    root = Path(launchers.__file__).parents[1]
    # An installed package is found without help, and site-packages in front would hide the standard library.
    ours = [] if root.name in {"site-packages", "dist-packages"} else [str(root)]
    theirs = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return [*ours, *(str(Path(entry).absolute()) for entry in theirs)]


def inherited_environment() -> dict[str, str]:
    """Our own environment as a job inherits it, without what belongs to another torchrun."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_VARIABLES)}


def _processes(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():  # psutil.process_iter shares a cache among threads
        # Other users' processes cannot be read, and any process may end while it is looked at.
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.pid != os.getpid() and belongs(process) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def marked_processes(folder: str) -> list[psutil.Process]:
    """The living processes of this machine whose marker is `folder`, a trial's, or lies below it."""
    return _processes(lambda process: _is_marked(process, folder))


def _is_marked(process: psutil.Process, folder: str) -> bool:
    marker = process.environ().get(MARKER)
    return marker is not None and Path(marker).is_relative_to(folder)


class RunningJob(Protocol):
    """The processes of one trial on this machine, the whole tree of them."""

    def ended(self) -> bool:
        """Whether the first process has ended."""

    def end(self, grace_s: float) -> tuple[int, ...]:
        """End every process: SIGTERM, and SIGKILL after `grace_s`; may be called again.

        Returns:
            The process ids that even SIGKILL did not end; empty but for a process that hangs in a driver.
        """

    @property
    def exit_code(self) -> int | None:
        """The first process's exit code, negative for a signal; None before `end`."""


class Job:
    """A job started cold.

    They are known as descendants, as members of the process group, and by the marker, which also finds those
    that changed their session after their parent died.
    """

    def __init__(self, argv: tuple[str, ...], env: Mapping[str, str], folder: Path, output: Path) -> None:
        """Start `argv` in `folder`, in its own session, its output appended to `output`; raises OSError."""
        self._marker = env[MARKER]
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                argv,
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether the first process has ended. It stays unreaped, so that its id stays its own."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self, grace_s: float) -> tuple[int, ...]:
        """See RunningJob; the first process is reaped."""
        left = end_processes(self._alive, grace_s)
        if self.ended():
            self._process.wait()
        return tuple(process.pid for process in left)

    @property
    def exit_code(self) -> int | None:
        """See RunningJob."""
        return self._process.returncode

    def _alive(self) -> list[psutil.Process]:
        root = self._process.pid
        if self._process.returncode is not None:
            return marked_processes(self._marker)
        descendants: set[psutil.Process] = set()
        with suppress(psutil.Error):
            descendants.update(psutil.Process(root).children(recursive=True))
        return _processes(
            lambda process: (
                process in descendants or os.getpgid(process.pid) == root or _is_marked(process, self._marker)
            )
        )


def end_marked(folder: str, grace_s: float) -> tuple[int, ...]:
    """End what a killed launcher has left running for a trial, or for any trial of a sweep, by its folder.

    Returns:
        The process ids that even SIGKILL did not end.
    """
    return tuple(process.pid for process in end_processes(lambda: marked_processes(folder), grace_s))


def end_processes(find: Callable[[], list[psutil.Process]], grace_s: float) -> list[psutil.Process]:
    """End what `find` finds, until it finds nothing: SIGTERM, and SIGKILL after `grace_s`; return what is left."""
    alive = find()
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_S)):
        deadline_s = time.monotonic() + patience_s
        told: set[psutil.Process] = set()
        # Looked up anew each time: a process may be started while the others are ended.
        while alive and time.monotonic() < deadline_s:
            for process in set(alive) - told:
                with suppress(psutil.Error):
                    process.send_signal(number)
            told.update(alive)
            time.sleep(0.05)
            alive = find()
    return alive
