"""Room for the end of a sweep: files that stand in its folder while it runs, and that are removed to make room."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_FILES: Final = 32
_FILE_BYTES: Final = 8 << 10
"""How many files keep room, and the size of each. Assumed: a full disk lacks bytes or names for files. The end of a
sweep writes its status, its summary, MLflow's record, and what MLflow keeps of the last trials; all are small."""


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep room in a folder until `make_room`, or until the block ends.

    Raises:
        OSError: if there is no room left.
    """
    try:
        for path in _paths(folder):
            path.write_bytes(os.urandom(_FILE_BYTES))
        yield
    finally:
        make_room(folder)


def make_room(folder: Path) -> None:
    """Remove the files that keep room."""
    for path in _paths(folder):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _paths(folder: Path) -> list[Path]:
    return [folder / f".reserve-{number}" for number in range(_FILES)]
