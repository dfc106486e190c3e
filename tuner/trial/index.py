"""Reads and writes an index of a sweep's finished trials: one SQLite file that saves reading thousands of trial files.

The trial folders are the record of truth, and the index may be deleted at any time. An index that is damaged, of
another version, or with an unexpected schema is treated as missing. An entry is valid only as long as the size and
modification time of the files from which it was made do not change. The index file is always replaced as a whole, so
that several processes may read and write it at once.
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

_TABLE: Final = (
    "CREATE TABLE trials "
    "(name TEXT PRIMARY KEY, stamp TEXT NOT NULL, trial BLOB NOT NULL, ranks BLOB NOT NULL)"
)
_INSERT: Final = "INSERT INTO trials VALUES (?, ?, ?, ?)"
_ROWS: Final = "SELECT name, stamp, trial, ranks FROM trials"

MOST_BYTES: Final = 512 << 20
"""The size in bytes of the largest index that is written or read, since it is read into memory as a whole. Assumed:
10,000 trials with the records of 256 ranks each take half of it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The entry for one trial in the index."""

    stamp: str
    """The sizes and modification times that the trial's files had when the entry was made (see `stamp_of`)."""
    trial: bytes
    """The trial as JSON, without the records of its ranks."""
    ranks: bytes
    """The records of the trial's ranks as JSON."""


def stamp_of(files: Iterable[str]) -> str | None:
    """Return a text with the present sizes and modification times of files.

    It is None if one of the files is missing or is no regular file.
    """
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
    """Return the entries of an index, by the name of the trial's folder; empty if the index cannot be used.

    Args:
        path: the path of the index file.
        version: the expected version of the entries' content; an index of another version cannot be used.
    """
    with suppress(OSError, sqlite3.Error, ValueError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            return {}
        # With `immutable`, SQLite neither locks the file nor reads a journal beside it.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            # Another schema may have views, and reading from a view may never end.
            has_version = database.execute("PRAGMA user_version").fetchone() == (version,)
            tables = database.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
            if has_version and tables == [(_TABLE,)]:
                return {row[0]: Entry(*row[1:]) for row in database.execute(_ROWS) if _is_entry(row)}
    return {}


def _is_entry(row: tuple[object, ...]) -> bool:
    """Return whether a row's values have the types of the table's columns, which SQLite does not enforce."""
    return [type(value) for value in row] == [str, str, bytes, bytes]


def write_index(path: Path, version: int, entries: Mapping[str, Entry]) -> None:
    """Replace the index by one with these entries, by folder name; do nothing if it would be too large.

    An index that cannot be written, as on a full disk, is left as it was, without an error.
    """
    if sum(len(entry.trial) + len(entry.ranks) for entry in entries.values()) > MOST_BYTES // 2:
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # several may write at once
    with suppress(OSError, sqlite3.Error):
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as database:
                # A power loss may leave a damaged index, which `read_index` treats as missing.
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
