"""A process is told from those of others where its id says who it is, and only there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.watch import ownership
from launchers.watch.ownership import OwnProcesses

NOWHERE = 2**22 + 1
"""The id of no process: above the kernel's largest."""


@pytest.fixture
def zombie() -> Iterator[int]:
    """Return the id of a process that has ended, and that nobody has waited for yet."""
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    while "State:\tZ" not in Path(f"/proc/{child.pid}/status").read_text(encoding="ascii"):
        pass
    yield child.pid
    child.stdout.close()
    child.wait()


def test_a_process_that_runs_without_the_marker_is_somebody_elses(
    monkeypatch: pytest.MonkeyPatch, zombie: int
) -> None:
    monkeypatch.setattr(ownership, "sees_all_processes", lambda: True)
    own = OwnProcesses(Path("/night/trials/t0000"), (NOWHERE + 1,))
    assert own.excludes(os.getppid())
    assert own.excludes(1), "another user's process, or at least not ours"
    assert own.excludes(NOWHERE + 1), "it used the GPU before the trial"
    assert not own.excludes(os.getpid())
    assert not own.excludes(NOWHERE), "it may be a rank that has just ended"
    assert not own.excludes(zombie)


def test_in_a_container_an_id_says_nothing_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "sees_all_processes", lambda: False)
    own = OwnProcesses(Path("/night/trials/t0000"), (NOWHERE + 1,))
    assert not own.excludes(os.getppid())
    assert own.excludes(NOWHERE + 1)


def test_the_first_pid_namespace_is_known_by_the_kernels_number() -> None:
    namespace = Path("/proc/self/ns/pid").readlink()
    assert ownership.sees_all_processes() is (str(namespace) == "pid:[4026531836]")
