"""The results folder of a sweep: its paths, and the checks that it belongs to one sweep and one machine."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuner.errors import InputError
from tuner.files import read_json, read_json_data, refuse_unsafe_entries, to_data, write_json
from tuner.predict.calibration import Calibration, Machine
from tuner.sweep.configuration import Sweep
from tuner.sweep.deadline import KeptDeadline
from tuner.sweep.journal import refuse_foreign_journal
from tuner.sweep.lock import hold
from tuner.sweep.reserve import reserved
from tuner.sweep.tracking_uri import refuse_password
from tuner.trial.contract import TrialFolder
from tuner.trial.finished import trial_folder

IDENTITY = ("workload", "cluster", "program", "seed")
"""Keys of `sweep.json` that must stay as they are when a sweep is resumed, or its trials could not be compared."""

_UNFIT = frozenset("?%{}")
"""Characters that a results folder's path must not hold: SQLAlchemy interprets ? and %, and Optuna formats braces."""

_DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})
"""The error numbers of a disk that is full or fails; any other one says that a user named an unfit folder."""


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """The paths of all files and folders of one sweep; no other code builds these paths."""

    path: Path

    @property
    def identity(self) -> Path:
        """The file that holds the resolved Sweep of the last run."""
        return self.path / "sweep.json"

    @property
    def study(self) -> Path:
        """The SQLite file of the Optuna study."""
        return self.path / "study.db"

    @property
    def tracking_store(self) -> Path:
        """The SQLite file of MLflow, if the sweep is tracked in its own folder."""
        return self.path / "mlflow.db"

    @property
    def machine(self) -> Path:
        """The file of the Machine that the trials run on, with the versions that they depend on."""
        return self.path / "machine.json"

    @property
    def calibration(self) -> Path:
        """The file of the Calibration that the predictions use, taken when the sweep began; absent without one."""
        return self.path / "calibration.json"

    def read_calibration(self) -> Calibration | None:
        """Return the Calibration; None if there is none.

        Raises:
            InputError: if the file cannot be read.
        """
        return read_json(Calibration, self.calibration) if self.calibration.exists() else None

    @property
    def status(self) -> Path:
        """The file of the Status of the tuner that runs the sweep or ran it last."""
        return self.path / "status.json"

    @property
    def deadline(self) -> Path:
        """The file of the KeptDeadline, which holds until the user gives another; absent without one."""
        return self.path / "deadline.json"

    def read_deadline(self) -> KeptDeadline | None:
        """Return the KeptDeadline; None if there is none.

        Raises:
            InputError: if the file cannot be read.
        """
        return read_json(KeptDeadline, self.deadline) if self.deadline.exists() else None

    @property
    def request(self) -> Path:
        """The file with a user's request to the running tuner; absent if there is none."""
        return self.path / "request.json"

    @property
    def lock(self) -> Path:
        """The lock file, which names the tuner that holds the folder."""
        return self.path / "lock"

    @property
    def trials(self) -> Path:
        """The folder of the trial folders."""
        return self.path / "trials"

    def trial(self, number: int) -> TrialFolder:
        """Return the folder of the trial with this number."""
        return trial_folder(self.path, number)

    @contextmanager
    def claimed(self, sweep: Sweep, machine: Machine | None = None) -> Iterator[Callable[[], None]]:
        """Hold the folder for the tuner that runs this sweep; the kernel releases it however the process ends.

        While it is held, room is kept for the end of the sweep (`tuner.sweep.reserve`). Gives a function that raises
        OSError if the folder was deleted, or made anew, since then.

        Args:
            sweep: the sweep that the folder holds or will hold.
            machine: what the trials run on; None if it is unknown, in which case it is not compared.

        Raises:
            InputError: if the folder may not be written, if another tuner holds it, or if it holds results of another
                sweep or of trials on other hardware or software. Neither `sweep.json` nor `machine.json` changes then.
            OSError: if a file of the folder cannot be written, as on a full disk.
        """
        refuse_password(sweep.tracking.uri, "key 'tracking.uri'")  # sweep.json must hold none
        self._create()
        with hold(self.lock) as check_claim:
            self._refuse_other_sweep(sweep)
            self._refuse_other_machine(machine)
            if machine is not None and self._recorded_machine() != machine:
                write_json(self.machine, machine)
            if self._recorded_sweep() != to_data(sweep):
                write_json(self.identity, sweep)
            self.request.unlink(missing_ok=True)  # a request that is here now was for a tuner that has ended
            with reserved(self.path):
                yield check_claim

    def _create(self) -> None:
        if unfit := sorted(_UNFIT & set(str(self.path.absolute()))):
            raise InputError(
                f"{self.path}: the results folder's path holds {' '.join(unfit)}, which the URI of a SQLite file "
                "cannot; name another with --results"
            )
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, "no permission to write")
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise
            raise InputError(
                f"{self.path}: the results folder cannot be written: {error.strerror or error}; "
                "name another with --results"
            ) from None
        if not self.identity.exists():
            # Commands, plans and logs of trials may hold secrets. The user can open the folder to others later.
            with suppress(PermissionError):  # the folder belongs to somebody else
                self.path.chmod(stat.S_IMODE(self.path.stat().st_mode) & ~0o077)
        refuse_unsafe_entries(self.path)
        for database in (self.study, self.tracking_store):
            refuse_foreign_journal(database)

    def _recorded_sweep(self) -> Any:
        """Return `sweep.json` as JSON data; None if there is none.

        Raises:
            InputError: if the file is damaged.
        """
        try:
            recorded = read_json_data(self.identity) if self.identity.exists() else None
        except InputError as error:
            raise InputError(f"{error}; move the folder away, or name another with --results") from None
        return recorded if recorded is None or isinstance(recorded, dict) else {}

    def _recorded_machine(self) -> Machine | None:
        return read_json(Machine, self.machine) if self.machine.exists() else None

    def _refuse_other_sweep(self, sweep: Sweep) -> None:
        recorded = self._recorded_sweep()
        changed = [] if recorded is None else differences(_identity(recorded), _identity(to_data(sweep)))
        if changed:
            raise InputError(
                f"{self.path}: holds the results of another sweep; different: {'; '.join(changed[:5])}. "
                "Give this sweep another name, or another folder with --results"
            )

    def _refuse_other_machine(self, machine: Machine | None) -> None:
        recorded = self._recorded_machine()
        if machine is None or recorded is None or recorded == machine:
            return
        if any(self.trials.glob("t*/result.json")):
            changed = differences(to_data(recorded), to_data(machine), "machine")
            raise InputError(
                f"{self.path}: its trials ran on other hardware or software, and what is measured now could not be "
                f"compared with them; different: {'; '.join(changed[:5])}. Go back to those, or give this sweep "
                "another name, or another folder with --results"
            )

    def sweep(self) -> Sweep:
        """Read the sweep that this folder holds.

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


def differences(recorded: Any, wanted: Any, key: str = "") -> list[str]:
    """Return one line for each key in which two JSON values differ, with both values."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        return [
            line
            for name in sorted(recorded.keys() | wanted.keys())
            for line in differences(recorded.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if recorded == wanted else [f"{key} was {recorded!r}, is now {wanted!r}"]
