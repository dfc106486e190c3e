"""The results folder of a sweep: its paths, and whose it is."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.calibration import Calibration
from tuner.errors import InputError
from tuner.files import read_json, to_data, write_json
from tuner.report import trial_folder
from tuner.sweep_file import Sweep
from tuner.trial import TrialFolder

IDENTITY = ("workload", "cluster", "program", "seed")
"""What must not change between two runs of a sweep, or its trials could not be compared."""

_UNFIT = frozenset("?%{}")
"""SQLAlchemy reads ? and % in a path as its own, and Optuna formats braces."""


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """The paths of one sweep: no other place spells them."""

    path: Path

    @property
    def identity(self) -> Path:
        """The sweep, resolved, as it last ran."""
        return self.path / "sweep.json"

    @property
    def study(self) -> Path:
        """Optuna's SQLite file."""
        return self.path / "study.db"

    @property
    def calibration(self) -> Path:
        """The Calibration that its predictions rest on, as it was at the sweep's start; absent without one."""
        return self.path / "calibration.json"

    def read_calibration(self) -> Calibration | None:
        """The Calibration, if there is one; raises InputError if it cannot be read."""
        return read_json(Calibration, self.calibration) if self.calibration.exists() else None

    @property
    def trials(self) -> Path:
        """The folder of the trial folders."""
        return self.path / "trials"

    def trial(self, number: int) -> TrialFolder:
        """The folder of one trial."""
        return trial_folder(self.path, number)

    def claim(self, sweep: Sweep) -> None:
        """Make the folder this sweep's, or find that it already is.

        Raises:
            InputError: if it cannot be written, or holds the results of a sweep of something else.
        """
        if unfit := sorted(_UNFIT & set(str(self.path.absolute()))):
            raise InputError(
                f"{self.path}: the results folder's path holds {' '.join(unfit)}, which the URI of a SQLite file "
                "cannot; name another with --results"
            )
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(None, "no permission to write")
            recorded = (
                json.loads(self.identity.read_text(encoding="utf-8")) if self.identity.exists() else None
            )
        except OSError as error:
            raise InputError(
                f"{self.path}: the results folder cannot be written: {error.strerror or error}; "
                "name another with --results"
            ) from None
        except ValueError:
            raise InputError(
                f"{self.identity}: is not JSON; move the folder away, or name another with --results"
            ) from None
        wanted = to_data(sweep)
        if recorded is not None and not isinstance(recorded, dict):
            recorded = {}
        differences = [] if recorded is None else _differences(_identity(recorded), _identity(wanted))
        if differences:
            raise InputError(
                f"{self.path}: holds the results of another sweep; different: {'; '.join(differences[:5])}. "
                "Give this sweep another name, or another folder with --results"
            )
        if recorded != wanted:
            write_json(self.identity, wanted)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one tuner; the kernel lets go of it however the process ends.

        Raises:
            InputError: if another tuner holds it.
        """
        with (self.path / "lock").open("w", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EACCES}:
                    raise
                raise InputError(
                    f"{self.path}: another megatune is running this sweep; `megatune show {self.path}` tells how "
                    "far it is"
                ) from None
            yield

    def sweep(self) -> Sweep:
        """The sweep that this folder holds.

        Raises:
            InputError: if it holds none.
        """
        if not self.identity.exists():
            raise InputError(
                f"{self.path}: holds no sweep (no {self.identity.name}); name a folder that `sweep` wrote"
            )
        return read_json(Sweep, self.identity)


def _identity(sweep: dict[str, Any]) -> dict[str, Any]:
    return {key: sweep.get(key) for key in IDENTITY}


def _differences(recorded: Any, wanted: Any, key: str = "") -> list[str]:
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        return [
            line
            for name in sorted(recorded.keys() | wanted.keys())
            for line in _differences(recorded.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if recorded == wanted else [f"{key} was {recorded!r}, is now {wanted!r}"]
