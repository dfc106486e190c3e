"""Reads from a results folder what MLflow should hold: the finished trials, and the record of the sweep's end."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT, read_json, write_json
from tuner.trial.contract import TrialFolder
from tuner.trial.finished import FinishedTrial, read_trial

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How an MLflow run ended; the values are MLflow's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepClosing:
    """How the sweep ended: the content of `mlflow.json` in the results folder, which has no such file while it runs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    status: Status
    ended_ms: int
    """The time of the end, in milliseconds since the epoch."""
    summary: str
    """The sweep's summary in Markdown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A finished trial, and the hash of its files that tells whether its MLflow run is up to date."""

    trial: FinishedTrial
    folder: TrialFolder
    record: str
    """A hash of the trial's `source.json` and `result.json`. An MLflow run tagged with another hash is replaced."""


@dataclass(frozen=True, slots=True)
class _ReadEntry:
    """An entry, with the inode and modification time that its `result.json` had when the entry was read."""

    inode: int
    modified_ns: int
    entry: Entry


class Spool:
    """Reads the finished trials and the end of a sweep from its folder; reads a trial again only if it has changed."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._read: dict[Path, _ReadEntry] = {}

    def entries(self) -> tuple[list[Entry], list[str]]:
        """Return the finished trials in order of their numbers, and one message per trial that cannot be read."""
        entries: list[Entry] = []
        problems: list[str] = []
        for path in sorted(self.results.glob("trials/t*")):
            try:
                entry = self._entry(TrialFolder(path))
            except (InputError, OSError) as error:
                problems.append(str(error))
            else:
                entries += [] if entry is None else [entry]
        return sorted(entries, key=lambda entry: entry.trial.number), problems

    def _entry(self, folder: TrialFolder) -> Entry | None:
        """Return the entry of a trial's folder; None if the trial has not finished."""
        try:
            state = folder.result.stat()
        except FileNotFoundError:
            return None
        read = self._read.get(folder.path)
        if read is None or (read.inode, read.modified_ns) != (state.st_ino, state.st_mtime_ns):
            contents = [path.read_bytes() for path in (folder.source, folder.result) if path.exists()]
            record = hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
            entry = Entry(trial=read_trial(folder), folder=folder, record=record)
            read = self._read[folder.path] = _ReadEntry(state.st_ino, state.st_mtime_ns, entry)
        return read.entry

    def end(self) -> SweepClosing | None:
        """Return how the sweep ended; None while it runs, or if it was killed before it could note its end.

        Raises:
            InputError: if `mlflow.json` cannot be read.
        """
        path = _end_path(self.results)
        return read_json(SweepClosing, path) if path.exists() else None


def note_start(results: Path) -> None:
    """Delete the record of the sweep's end from its folder, since the sweep starts or is resumed."""
    _end_path(results).unlink(missing_ok=True)


def note_end(results: Path, end: SweepClosing) -> None:
    """Write `mlflow.json`, the record of how the sweep ended, into the sweep's folder.

    Raises:
        OSError: if the file cannot be written, as on a full disk.
    """
    write_json(_end_path(results), end)


def _end_path(results: Path) -> Path:
    return results / "mlflow.json"
