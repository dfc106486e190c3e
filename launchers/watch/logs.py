"""Bounds the output of a job in size while it grows, and reads it from its end."""

from pathlib import Path

from tuner.files import regular

KEPT_BYTES = 1 << 20
"""How much is kept of the start of a file that is cut, and how much of its end."""


def bound(folder: Path, limit_bytes: int) -> dict[Path, bytes]:
    """Cut the files under `folder` to their heads once they take more than `limit_bytes` on disk together.

    Their writers go on at the position they had reached, which leaves a hole that takes no space.

    Returns:
        The tail that each cut file had. `close_gap` takes it once the file's writer is gone.
    """
    # A link may lead to a file that is no log, and a pipe would wait for its reader.
    paths = (path for path in folder.rglob("*.log") if path.is_file() and not path.is_symlink())
    sizes = {path: path.stat().st_blocks * 512 for path in paths}
    if sum(sizes.values()) <= limit_bytes:
        return {}
    return {path: _cut(path) for path, size in sizes.items() if size > KEPT_BYTES}


def _cut(path: Path) -> bytes:
    """Cut a file to its first KEPT_BYTES; return what it had in its last KEPT_BYTES beyond them."""
    with path.open("r+b") as file:
        file.seek(max(KEPT_BYTES, file.seek(0, 2) - KEPT_BYTES))
        file_tail = file.read()
        file.truncate(KEPT_BYTES)
    return file_tail.replace(b"\0", b"")


def close_gap(path: Path, earlier_tail: bytes) -> None:
    """Rewrite a cut file as its head, a line that says so, and its newest output.

    Args:
        path: The file.
        earlier_tail: The tail that the file had when it was cut; it precedes what was written since.
    """
    with path.open("rb") as file:
        head = file.read(KEPT_BYTES)
        file.seek(max(KEPT_BYTES, file.seek(0, 2) - KEPT_BYTES))
        newest = (earlier_tail + file.read().replace(b"\0", b""))[-KEPT_BYTES:]
    path.write_bytes(head + b"\n[... output cut here: the job wrote too much ...]\n" + newest)


def tail(path: Path, size_bytes: int = 1 << 16) -> str:
    """Return the end of a file as text, whatever bytes it holds; empty if there is no such file."""
    try:
        with open(path, "rb", opener=regular) as file:
            file.seek(max(0, file.seek(0, 2) - size_bytes))
            return file.read().replace(b"\0", b"").decode(errors="replace")
    except OSError:
        return ""
