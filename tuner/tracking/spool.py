"""What MLflow should hold of a sweep. The spool is the trial folders themselves, and a record of the sweep's end."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT, read_json, write_json
from tuner.trial.contract import TrialFolder
from tuner.trial.finished import FinishedTrial, read_trial

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""MLflow's words for how a run ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepEnd:
    """How the sweep ended; `mlflow.json` in its folder, absent while it runs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    status: Status
    ended_ms: int
    """Since the epoch."""
    summary: str
    """In Markdown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A finished trial, and by which record MLflow is known to hold it."""

    row: FinishedTrial
    folder: TrialFolder
    record: str
    """A hash of the trial's result and source."""


class Spool:
    """Reads what a sweep's folder holds; what has not changed since the last look is not read again."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._seen: dict[Path, tuple[tuple[int, int], Entry]] = {}

    def entries(self) -> tuple[list[Entry], list[str]]:
        """The finished trials by number, and what is wrong with those that cannot be read."""
        entries: list[Entry] = []
        problems: list[str] = []
        for path in sorted(self.results.glob("trials/t*")):
            try:
                entries += self._entry(TrialFolder(path))
            except (InputError, OSError) as error:
                problems.append(str(error))
        return sorted(entries, key=lambda entry: entry.row.number), problems

    def _entry(self, folder: TrialFolder) -> Iterator[Entry]:
        try:
            state = folder.result.stat()
        except FileNotFoundError:
            return
        version = (state.st_ino, state.st_mtime_ns)
        seen = self._seen.get(folder.path)
        if seen is None or seen[0] != version:
            contents = [path.read_bytes() for path in (folder.source, folder.result) if path.exists()]
            record = hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
            seen = version, Entry(row=read_trial(folder), folder=folder, record=record)
            self._seen[folder.path] = seen
        yield seen[1]

    def end(self) -> SweepEnd | None:
        """How the sweep ended; None while it runs, or where it was killed.

        Raises:
            InputError: if the record cannot be read.
        """
        path = _end_path(self.results)
        return read_json(SweepEnd, path) if path.exists() else None


def begin(results: Path) -> None:
    """Note that the sweep runs (again)."""
    _end_path(results).unlink(missing_ok=True)


def end(results: Path, end: SweepEnd) -> None:
    """Note how the sweep ended; raises OSError where the disk takes nothing more."""
    write_json(_end_path(results), end)


def _end_path(results: Path) -> Path:
    return results / "mlflow.json"
