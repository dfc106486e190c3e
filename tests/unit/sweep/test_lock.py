"""Only one tuner at a time uses a results folder, and the lock file names it."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import InputError
from tuner.files import to_data, write_json
from tuner.sweep.lock import Holder, hold, is_shared, refusal

SOMEONE = Holder(user="ann", host="node7", pid=4321, since="2026-01-01T00:00:00+00:00", started_s=1.0)


@pytest.mark.parametrize(
    ("host", "has_flock", "is_shared", "is_alive", "message"),
    [
        ("node7", True, False, True, None),  # another process has the holder's id now
        ("node7", True, True, True, None),
        ("node7", True, True, False, None),
        ("node7", False, True, False, None),
        ("node7", False, True, True, "another megatune is running this sweep"),
        ("node8", True, False, False, None),
        ("node8", True, True, False, "another megatune may be running this sweep"),
        ("node8", False, True, False, "another megatune may be running this sweep"),
        ("node8", False, False, False, "another megatune may be running this sweep"),
    ],
)
def test_a_holder_is_stale_only_if_that_is_certain(
    host: str, has_flock: bool, is_shared: bool, is_alive: bool, message: str | None
) -> None:
    reason = refusal(SOMEONE, host, has_flock=has_flock, is_shared=is_shared, is_alive=is_alive)
    assert (reason is None) == (message is None)
    if reason is not None and message is not None:
        assert message in reason
        assert "ann on node7, process 4321, since 2026-01-01" in reason


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_alive", [False, True])
def test_without_the_kernels_lock_no_holder_on_another_host_is_overruled(
    is_shared: bool, is_alive: bool
) -> None:
    assert refusal(SOMEONE, "node8", has_flock=False, is_shared=is_shared, is_alive=is_alive) is not None


@pytest.mark.parametrize(
    ("name", "shared"), [("nfs4", True), ("lustre", True), ("fuse.sshfs", True), ("ext4", False)]
)
def test_file_systems_that_hosts_may_share_are_known(name: str, shared: bool) -> None:
    assert is_shared(name) is shared


def test_the_file_names_its_holder_while_it_is_held_and_is_empty_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path):
        assert f'"pid": {os.getpid()}' in path.read_text()
        with (
            pytest.raises(
                InputError, match=rf"is running this sweep \(.* process {os.getpid()}, since 2"
            ) as refused,
            hold(path),
        ):
            pass
        assert f"megatune show {tmp_path}" in str(refused.value)
    assert path.read_text() == ""
    with hold(path):
        pass


def test_a_lock_is_refused_while_its_holder_lives_and_taken_over_once_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys, signal, pathlib\nfrom tuner.sweep.lock import hold\n"
        "with hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    signal.pause()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="another megatune is running this sweep"), hold(path):
                pass
        finally:
            holder.kill()
    with hold(path):
        pass
    assert f"process {holder.pid}, since" in caplog.text
    assert "was killed: this one takes its place" in caplog.text


def _no_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make flock fail, as on an NFS mount without a lock daemon."""

    def fails(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_the_content_decides_if_the_kernel_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _no_flock(monkeypatch, number)
    path = tmp_path / "lock"
    with hold(path), pytest.raises(InputError, match="another megatune is running this sweep"), hold(path):
        pass
    write_json(path, {**to_data(SOMEONE), "host": os.uname().nodename})
    with hold(path):  # the holder was a process of this host, and is dead
        pass
    write_json(path, SOMEONE)
    with (
        pytest.raises(InputError, match=r"lock: another megatune may .* end it there and delete this file"),
        hold(path),
    ):
        pass
    path.write_text('{"user": "a')
    with hold(path):
        pass


def test_any_other_error_of_flock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), hold(tmp_path / "lock"):
        pass
