"""Optuna's study as a view of the trial folders: rebuilt wherever the two differ."""

import logging
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.search.observation import STATES
from tuner.trial.contract import TrialResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyTrial:
    """One trial as the study should hold it."""

    params: Mapping[str, Any]
    result: TrialResult | None
    """None for a trial that was begun and has no result: it waits."""
    source: str
    label: str

    @property
    def state(self) -> TrialState:
        """Its Optuna state."""
        return TrialState.WAITING if self.result is None else STATES[self.result.outcome]

    def attributes(self) -> dict[str, Any]:
        """Its user attributes."""
        shown: dict[str, Any] = {"source": self.source, "layout": self.label}
        if self.result is not None and self.state is not TrialState.WAITING:
            shown |= {"outcome": str(self.result.outcome), "reason": self.result.reason}
        return shown


def open_study(
    path: Path,
    name: str,
    sampler: BaseSampler,
    space: Mapping[str, BaseDistribution],
    trials: Sequence[StudyTrial],
) -> optuna.Study:
    """Open the study at `path` (SQLite), holding exactly `trials`, numbered from 0 in their order.

    A study that differs, or cannot be read, is written anew: the trial folders are the truth.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    frozen = [_frozen(trial, space) for trial in trials]
    study = _load(path, name, sampler)
    if study is None or [_essence(t) for t in study.get_trials(deepcopy=False)] != [
        _essence(t) for t in frozen
    ]:
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        study = _create(path, name, sampler)
        study.add_trials(frozen)
    return study


def _load(path: Path, name: str, sampler: BaseSampler) -> optuna.Study | None:
    if not path.exists():
        return None
    try:
        return optuna.load_study(study_name=name, storage=_storage(path), sampler=sampler)
    except Exception:  # a torn or foreign file fails in any of SQLite's, SQLAlchemy's and Optuna's ways
        logging.getLogger(__name__).warning("%s: cannot be read; rebuilding it from the trial folders", path)
        return None


def _create(path: Path, name: str, sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(study_name=name, storage=_storage(path), sampler=sampler, direction="minimize")


class _Unsynced(sqlite3.Connection):
    """Leaves it to the kernel when to write: Optuna commits some twenty times a trial, each a wait for the disk.

    A killed tuner loses nothing by it. What a power loss tears differs from the folders, and is made anew.
    """

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        self.execute("PRAGMA synchronous = OFF")


def _storage(path: Path) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(
        f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"factory": _Unsynced}}
    )


def _frozen(trial: StudyTrial, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    known = {name: value for name, value in trial.params.items() if name in space}
    if trial.state is TrialState.WAITING:
        return create_trial(
            state=TrialState.WAITING, system_attrs={"fixed_params": known}, user_attrs=trial.attributes()
        )
    metrics = trial.result.metrics if trial.result else None
    return create_trial(
        state=trial.state,
        value=metrics.step_time_ms if metrics else None,
        params=known,
        distributions={name: space[name] for name in known},
        user_attrs=trial.attributes(),
    )


def _essence(trial: FrozenTrial) -> tuple[Any, ...]:
    params = (
        trial.system_attrs.get("fixed_params", trial.params)
        if trial.state is TrialState.WAITING
        else trial.params
    )
    value = trial.value if trial.state is TrialState.COMPLETE else None
    return trial.state, dict(params), trial.distributions, value, trial.user_attrs
