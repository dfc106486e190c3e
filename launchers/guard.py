"""Runs a command, and ends it if the process that started the guard dies: `python -m launchers.guard COMMAND...`.

A killed process cannot end what it started, but the kernel closes its ends of all pipes. The guard's standard input
is a pipe from the process that started the guard. When this input ends, the guard ends the command and everything that
the command started. The guard becomes the parent of processes whose own parent dies, so it also finds those that moved
to another session.

The command's output goes to the guard's standard error. When the command ends, the guard writes one line to its
standard output, the command's exit code (negative for a signal), and waits for the end of its input.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from typing import NoReturn

import psutil

from launchers.processes import end_processes, is_running

ORPHAN_GRACE_S = 2.0
"""The time between SIGTERM and SIGKILL for a job whose tuner has died, in seconds. Assumed; it is short, since the next
tuner may need the GPUs."""

_PR_SET_CHILD_SUBREAPER = 36
"""An option of prctl, from linux/prctl.h."""
_POLL_MS = 500


def main(command: list[str]) -> NoReturn:
    """Run a command as the module's docstring says; exit this process with code 0 when everything has ended."""
    answers = os.dup(1)
    os.dup2(2, 1)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Ignored here: the command gets these signals itself. Unlike SIG_IGN, a handler is not inherited by it.
        signal.signal(number, lambda *_: None)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    code = wait_for_end(process.pid, 0)
    if code is not None:
        with suppress(BrokenPipeError):
            os.write(answers, b"%d\n" % code)
        while os.read(0, 1):
            pass
    end_descendants()
    os._exit(0)  # Popen does not know that the command was reaped


def adopt_orphans() -> None:
    """Have the kernel make this process the new parent of each descendant whose own parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait_for_end(pid: int, pipe: int) -> int | None:
    """Wait until a child process or a pipe ends; reap the child if it has ended.

    Args:
        pid: The child's process id.
        pipe: The file descriptor of a pipe's reading end. Anything that is written to it counts as its end.

    Returns:
        The child's exit code, negative for a signal; None if the pipe ended first.
    """
    end = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(pipe, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(_POLL_MS)}
            if end in ready:
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if pipe in ready:
                return None
    finally:
        os.close(end)


def end_descendants() -> None:
    """End all descendants of this process, and reap those that are its children."""
    end_processes(_descendants, ORPHAN_GRACE_S)
    reap()


def reap() -> None:
    """Reap the children of this process that have ended, without waiting for others."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if is_running(process)]


if __name__ == "__main__":
    main(sys.argv[1:])
