"""One tuner at a time in a results folder: the kernel's lock where it reaches, and a word on who holds it.

The kernel lets go of flock however its process ends. On a shared file system it may be missing (NFS without a lock
daemon) or hold on one host alone (Lustre's localflock, NFS's local_lock): there the file's content decides.
"""

import errno
import fcntl
import getpass
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, TextIO

import psutil
from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT, parse, to_data

_HELD = frozenset({errno.EAGAIN, errno.EACCES})
_MISSING = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
_SHARED = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "wekafs"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that holds a folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    user: str
    host: str
    pid: int
    since: str
    """ISO 8601, UTC."""
    started_s: float
    """When the process began, in seconds since the epoch: a process id is used again."""

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}"


def refusal(holder: Holder, host: str, *, has_flock: bool, is_shared: bool, is_alive: bool) -> str | None:
    """Why a folder whose lock file names `holder` may not be taken over from `host`; None where it may.

    Args:
        has_flock: The kernel has just given us its lock, which it does to one at a time as far as it reaches.
        is_shared: Other hosts may see the folder, so that it may not reach them.
        is_alive: The holder's process is there; of one of another host nobody here knows.
    """
    if holder.host == host:
        return f"another megatune is running this sweep ({holder})" if is_alive and not has_flock else None
    if has_flock and not is_shared:
        return None  # the host was renamed, as a container is that starts anew
    return (
        f"another megatune may be running this sweep ({holder}); from here, {host}, nobody can tell whether it still "
        "does: go on there, or end it there and delete this file"
    )


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock file, and say in it who does; where two start within an instant on a file system without flock,
    both do.

    Raises:
        InputError: if another process holds it, or one of another host may.
    """
    with path.open("a+", encoding="utf-8") as file:
        has_flock = _flock(file, path)
        holder, here = _read(file), _this_process()
        if holder is not None:
            told = refusal(
                holder,
                here.host,
                has_flock=has_flock,
                is_shared=is_shared(_file_system(path)),
                is_alive=_is_alive(holder),
            )
            if told:
                raise InputError(f"{path}: {told}")
            _log.warning("the last tuner (%s) was killed: going on in its place", holder)
        _write(file, json.dumps(to_data(here)) + "\n")
        try:
            yield
        finally:
            _write(file, "")


def holder_of(path: Path) -> Holder | None:
    """Who holds a lock file; None if nobody does, or if the holder is known to have died.

    Whether a holder on another host still lives cannot be told from here: it counts as holding.
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
    return file_system in _SHARED or file_system.startswith("fuse.")


_log = logging.getLogger(__name__)


def _flock(file: TextIO, path: Path) -> bool:
    """Whether the kernel gave its lock: False where it has none to give."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _MISSING:
            return False
        if error.errno not in _HELD:
            raise
        holder = _read(file)
        raise InputError(
            f"{path.parent}: another megatune is running this sweep{f' ({holder})' if holder else ''}; "
            f"`megatune show {path.parent}` tells how far it is"
        ) from None
    return True


def _read(file: TextIO) -> Holder | None:
    """Who the file names; None where it was let go, or is torn: whoever wrote it lost its power."""
    file.seek(0)
    try:
        return parse(Holder, json.loads(file.read()), file.name)
    except (ValueError, InputError):
        return None


def _write(file: TextIO, text: str) -> None:
    # In place: another file under this name would be another lock.
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
    """Whether the process is there, if its host is ours."""
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started_s) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _file_system(path: Path) -> str:
    """The type of the file system that a path lies on; empty where the kernel does not tell."""
    path = path.resolve()
    mounts = [
        (len(part.mountpoint), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if path.is_relative_to(part.mountpoint)
    ]
    return max(mounts)[1] if mounts else ""
