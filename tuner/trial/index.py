"""An index of the finished trials of a sweep in one file beside their folders: texts that were made from their files.

The trial folders are the truth. The index only saves the reading of thousands of files, so it may be deleted, and one
that cannot be used is as good as none: damaged, of another version, or with other tables than ours. Each entry counts
only as long as the files that it was made from keep their size and their time of modification. The index is replaced
as a whole, so that two processes may read and write it at once.
"""

import os
import secrets
import sqlite3
import stat
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TABLE: Final = "CREATE TABLE trials (name TEXT PRIMARY KEY, stamp TEXT NOT NULL, trial BLOB NOT NULL, ranks BLOB NOT NULL)"
_INSERT: Final = "INSERT INTO trials VALUES (?, ?, ?, ?)"
_ROWS: Final = "SELECT name, stamp, trial, ranks FROM trials"

MOST_BYTES: Final = 512 << 20
"""The bytes of the largest index that is written or read, since it is held in memory. Assumed: 10,000 trials with the
records of 256 ranks each take half of it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index holds of one trial."""

    stamp: str
    """Size and time of modification of the files that the entry was made from."""
    trial: bytes
    """The trial as JSON, without the records of its ranks."""
    ranks: bytes
    """The records of its ranks as JSON."""


def stamp_of(files: Iterable[str]) -> str | None:
    """Return the stamp of an entry that is made from these files now; None if one is missing or no regular file."""
    parts = []
    for file in files:
        try:
            found = os.lstat(file)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        parts.append(f"{found.st_mtime_ns}.{found.st_size}")
    return " ".join(parts)


def read_index(path: Path, version: int) -> dict[str, Entry]:
    """Return the entries of an index by the names of the trials' folders; none if the index cannot be used.

    Args:
        path: the file of the index.
        version: the version of the entries' texts; an index of another version cannot be used.
    """
    with suppress(OSError, sqlite3.Error, ValueError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            return {}
        # SQLite takes no lock of an immutable file, and follows no journal beside it.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            # Another schema may hold views, whose queries may never end.
            has_version = database.execute("PRAGMA user_version").fetchone() == (version,)
            tables = database.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
            if has_version and tables == [(_TABLE,)]:
                return {row[0]: Entry(*row[1:]) for row in database.execute(_ROWS) if _is_entry(row)}
    return {}


def _is_entry(row: tuple[object, ...]) -> bool:
    """Whether a row has the types of the table's columns, which SQLite does not enforce."""
    return [type(value) for value in row] == [str, str, bytes, bytes]


def write_index(path: Path, version: int, entries: Mapping[str, Entry]) -> None:
    """Replace the index by these entries, unless they are too many or the folder cannot be written."""
    if sum(len(entry.trial) + len(entry.ranks) for entry in entries.values()) > MOST_BYTES // 2:
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # several may write at once
    with suppress(OSError, sqlite3.Error):
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as database:
                # A power loss may leave a damaged index, which is as good as none.
                database.execute("PRAGMA synchronous = OFF")
                database.execute("PRAGMA journal_mode = OFF")
                database.execute(f"PRAGMA user_version = {version:d}")
                database.execute("BEGIN")
                database.execute(_TABLE)
                database.executemany(
                    _INSERT,
                    ((name, entry.stamp, entry.trial, entry.ranks) for name, entry in entries.items()),
                )
                database.execute("COMMIT")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
