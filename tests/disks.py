"""Disks for tests: small ones that can be filled, and folders that become read-only."""

import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_BLOCK = b"\0" * 4096


@contextmanager
def small_disk(folder: Path, size: str = "8m", names: int = 2000) -> Iterator[None]:
    """Mount a small disk on an empty folder; skip the test where that is forbidden.

    Args:
        folder: the folder.
        size: how many bytes the disk holds, as tmpfs takes it.
        names: how many files and folders it holds.

    Raises:
        pytest.skip.Exception: if no disk can be mounted here.
    """
    _mount("-t", "tmpfs", "-o", f"size={size},nr_inodes={names}", "tmpfs", str(folder))
    try:
        yield
    finally:
        # Lazily: a fork server keeps the log of its first job open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, for root as well; skip the test where that is forbidden."""
    _mount("--bind", str(folder), str(folder))
    try:
        # A process that writes a file there at this moment keeps the folder writable.
        _mount("-o", "remount,bind,ro", str(folder), patience_s=10.0)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill the disk of a folder to its last byte."""
    with suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(_BLOCK)


def fill_names(folder: Path) -> None:
    """Make files on the disk of a folder until it takes no further one."""
    (folder / "fillers").mkdir()
    with suppress(OSError):
        for number in itertools.count():
            (folder / "fillers" / str(number)).touch()


def delete(folder: Path) -> None:
    """Delete a folder although other processes write in it, as MLflow's may."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _mount(*arguments: str, patience_s: float = 0.0) -> None:
    until_s = time.monotonic() + patience_s
    while True:
        done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
        if not done.returncode:
            return
        if time.monotonic() >= until_s:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        time.sleep(0.05)
