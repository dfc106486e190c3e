"""The output of a job: bounded in size while it grows, and read from its end."""

from pathlib import Path

KEPT_BYTES = 1 << 20
"""What is kept of a file that was cut, from its start and from its end each."""


def bound(folder: Path, limit_bytes: int) -> dict[Path, bytes]:
    """Cut the files under `folder` to their heads once they take more than `limit_bytes` on disk together.

    Their writers go on where they were, which leaves a hole that takes no space.

    Returns:
        The files that were cut, and their tails until then: for `close_gap`, once their writers are gone.
    """
    sizes = {path: path.stat().st_blocks * 512 for path in folder.rglob("*.log")}
    if sum(sizes.values()) <= limit_bytes:
        return {}
    return {path: _cut(path) for path, size in sizes.items() if size > KEPT_BYTES}


def _cut(path: Path) -> bytes:
    with path.open("r+b") as file:
        file.seek(max(KEPT_BYTES, file.seek(0, 2) - KEPT_BYTES))
        end = file.read()
        file.truncate(KEPT_BYTES)
    return end.replace(b"\0", b"")


def close_gap(path: Path, earlier: bytes) -> None:
    """Rewrite a cut file as its head, a line that says so, and its tail, which `earlier` may begin."""
    with path.open("rb") as file:
        head = file.read(KEPT_BYTES)
        file.seek(max(KEPT_BYTES, file.seek(0, 2) - KEPT_BYTES))
        end = (earlier + file.read().replace(b"\0", b""))[-KEPT_BYTES:]
    path.write_bytes(head + b"\n[... output cut here: the job wrote too much ...]\n" + end)


def tail(path: Path, size_bytes: int = 1 << 16) -> str:
    """The end of a text file, whatever bytes it holds; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - size_bytes))
            return file.read().replace(b"\0", b"").decode(errors="replace")
    except OSError:
        return ""
