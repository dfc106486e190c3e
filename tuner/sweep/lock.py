"""Lets only one tuner at a time use a results folder: a lock file that the kernel locks and that names its holder.

The kernel releases its lock (flock) however the holder ends. A shared file system may lack flock (NFS without a lock
daemon) or apply it to one host only (Lustre's localflock, NFS's local_lock); the content of the file decides then.
"""

import errno
import fcntl
import getpass
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import ClassVar, TextIO

import psutil
from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT, parse, to_data
from tuner.printable import OneLine

_HELD_ERRORS = frozenset({errno.EAGAIN, errno.EACCES})
"""The error numbers that flock gives if another process holds the lock."""
_MISSING_ERRORS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""The error numbers that flock gives if the file system has no locks."""
_SHARED_FILE_SYSTEMS = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "wekafs"}
)
"""Types of file systems that several hosts may mount, as the kernel names them in its list of mounts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that holds a lock file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    user: OneLine
    host: OneLine
    pid: int
    since: OneLine
    """When the process took the lock: ISO 8601, UTC."""
    started_s: float
    """When the process began, in seconds since the epoch; a later process with its id has another time."""

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}"


def refusal(holder: Holder, host: str, *, has_flock: bool, is_shared: bool, is_alive: bool) -> str | None:
    """Return why a process on `host` must not take over a lock file that names `holder`; None if it may.

    Args:
        holder: the process that the lock file names.
        host: this machine.
        has_flock: whether the kernel has just given its lock to this process.
        is_shared: whether other hosts may see the file; the kernel's lock may then not apply to them.
        is_alive: whether the holder's process exists; ignored if the holder runs on another host.
    """
    if holder.host == host:
        return f"another megatune is running this sweep ({holder})" if is_alive and not has_flock else None
    if has_flock and not is_shared:
        return None  # no other host sees the file, so this one was renamed, as a restarted container is
    return (
        f"another megatune may be running this sweep ({holder}); from here, {host}, nobody can tell whether it still "
        "does: resume the sweep there, or end it there and delete this file"
    )


@contextmanager
def hold(path: Path) -> Iterator[Callable[[], None]]:
    """Hold a lock file, and write into it which process holds it.

    On a file system without flock, two processes that start at the same instant may both hold it.

    Gives a function that raises OSError if the file at `path` is gone, or is another one by now: its folder was
    deleted, and perhaps made anew by another tuner.

    Raises:
        InputError: if another process holds it, or a process of another host may.
        OSError: if the file cannot be opened, locked or written.
    """
    with path.open("a+", encoding="utf-8") as file:
        has_flock = _flock(file, path)
        holder, here = _read(file), _this_process()
        if holder is not None:
            reason = refusal(
                holder,
                here.host,
                has_flock=has_flock,
                is_shared=is_shared(_file_system(path)),
                is_alive=_is_alive(holder),
            )
            if reason:
                raise InputError(f"{path}: {reason}")
            _log.warning("the last tuner (%s) was killed: this one takes its place", holder)
        _write(file, json.dumps(to_data(here)) + "\n")
        try:
            yield partial(_check_same, file, path)
        finally:
            # A file that still names this process counts as free once the process has ended.
            with suppress(OSError):
                _write(file, "")


def holder_of(path: Path) -> Holder | None:
    """Return the process that holds a lock file; None if there is none, or if it is known to have died.

    A process on another host counts as holding it, since nobody here can tell whether it has died.
    """
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        holder = _read(file)
    if holder is None or (holder.host == socket.gethostname() and not _is_alive(holder)):
        return None
    return holder


def is_shared(file_system: str) -> bool:
    """Whether hosts may share a file system of this type."""
    return file_system in _SHARED_FILE_SYSTEMS or file_system.startswith("fuse.")


_log = logging.getLogger(__name__)


def _flock(file: TextIO, path: Path) -> bool:
    """Take the kernel's lock; return False if the file system has none.

    Raises:
        InputError: if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _MISSING_ERRORS:
            return False
        if error.errno not in _HELD_ERRORS:
            raise
        holder = _read(file)
        raise InputError(
            f"{path.parent}: another megatune is running this sweep{f' ({holder})' if holder else ''}; "
            f"`megatune show {path.parent}` says how far it is"
        ) from None
    return True


def _check_same(file: TextIO, path: Path) -> None:
    """Raise OSError if an open file is not the one at `path`."""
    if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise OSError(errno.ESTALE, "the folder was deleted and made anew", str(path.parent))


def _read(file: TextIO) -> Holder | None:
    """Return the holder that the file names; None if it is empty, or torn because its writer lost power."""
    file.seek(0)
    try:
        return parse(Holder, json.loads(file.read()), file.name)
    except (ValueError, InputError):
        return None


def _write(file: TextIO, text: str) -> None:
    # The file is written in place, since the kernel's lock belongs to the file and not to its name.
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _this_process() -> Holder:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"user {os.getuid()}"
    return Holder(
        user=user,
        host=socket.gethostname(),
        pid=os.getpid(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        started_s=psutil.Process().create_time(),
    )


def _is_alive(holder: Holder) -> bool:
    """Whether the holder's process exists, if its host is this machine."""
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started_s) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _file_system(path: Path) -> str:
    """Return the type of the file system that a path lies on; an empty string if the kernel does not say."""
    path = path.resolve()
    mounts = [
        (len(part.mountpoint), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if path.is_relative_to(part.mountpoint)
    ]
    return max(mounts)[1] if mounts else ""
