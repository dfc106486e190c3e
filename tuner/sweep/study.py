"""Keeps Optuna's study as a view of the trial folders, and rebuilds it if it differs from them."""

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.core.layout import KNOBS, Layout
from tuner.search.observation import STATES
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.state import RunningTrial, SweepState
from tuner.trial.contract import TrialResult
from tuner.trial.finished import FinishedTrial

MOST_AWAITED: Final = 500
"""The most trials with which a sweep waits for its study. Chosen: Optuna reads them in half a second."""
_CLOSING_S: Final = 10.0
"""The seconds that a sweep of more trials waits at its end until its study holds all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyTrial:
    """One trial as the study should hold it."""

    params: Mapping[str, Any]
    result: TrialResult | None
    """The result of the trial; None if the trial waits to run."""
    source: str
    label: str

    @property
    def state(self) -> TrialState:
        """The state of the trial in Optuna."""
        return TrialState.WAITING if self.result is None else STATES[self.result.outcome]

    def attributes(self) -> dict[str, Any]:
        """The user attributes of the trial in Optuna."""
        shown: dict[str, Any] = {"source": self.source, "layout": self.label}
        if self.result is not None and self.state is not TrialState.WAITING:
            shown |= {"outcome": str(self.result.outcome), "reason": self.result.reason}
        return shown


class StudyProjection(Sink):
    """Keeps Optuna's study in step with the trials of a running sweep.

    Optuna needs seconds to read thousands of trials, so with more than MOST_AWAITED a thread does the work, and the
    sweep does not wait for it. If the study cannot be written, one warning says so, and the next start of the sweep
    builds it anew from the trial folders.

    Args:
        path: The study's SQLite file.
        name: The study's name.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._study: optuna.Study | None = None
        self._space: dict[str, BaseDistribution] = {}
        self._running: dict[int, optuna.Trial] = {}
        self._backlog: _Backlog | None = None
        """Work that the sweep does not wait for; None while there are few trials."""

    def opened(self, snapshot: Snapshot, table: pd.DataFrame) -> None:
        """See Sink. The study's distributions hold every value that a row of the table may take."""
        self._do(snapshot, lambda: self._open(snapshot.state, table))

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        """See Sink."""
        self._do(snapshot, lambda: self._begin(trial))

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """See Sink."""
        self._do(snapshot, lambda: self._end(trial))

    def closed(self, reason: str) -> None:
        """See Sink. What is not written by then is written when the sweep is started again."""
        if self._backlog is not None:
            self._backlog.wait(_CLOSING_S)

    def _do(self, snapshot: Snapshot, work: Callable[[], None]) -> None:
        if self._backlog is None and snapshot.state.next_number > MOST_AWAITED:
            self._backlog = _Backlog()
        if self._backlog is None:
            work()
        else:
            self._backlog.add(work)

    def _open(self, state: SweepState, table: pd.DataFrame) -> None:
        with self._kept_going():
            self._space = distributions(table, list(state.layouts().values()))
            self._study = open_study(self._path, self._name, self._space, self._trials(state))

    def _begin(self, trial: RunningTrial) -> None:
        if self._study is None or trial.number in self._running:
            return
        with self._kept_going():
            if trial.number >= len(self._study.get_trials(deepcopy=False)):
                self._study.enqueue_trial(self._params(trial.layout))
            asked = self._study.ask(self._space)
            if asked.number != trial.number:
                raise RuntimeError(f"Optuna counts {asked.number} trials, the sweep {trial.number}")
            asked.set_user_attr("source", trial.source.source)
            asked.set_user_attr("layout", trial.layout.label())
            self._running[trial.number] = asked

    def _end(self, trial: FinishedTrial) -> None:
        if self._study is None or trial.number not in self._running:
            return
        with self._kept_going():
            asked, result = self._running.pop(trial.number), trial.result
            asked.set_user_attr("outcome", str(result.outcome))
            asked.set_user_attr("reason", result.reason)
            value = result.metrics.step_time_ms if result.metrics else None
            self._study.tell(asked, value, STATES[result.outcome])

    def _trials(self, state: SweepState) -> list[StudyTrial]:
        ended = [(trial.number, trial.layout, trial.source, trial.result) for trial in state.ended]
        waiting = [(trial.number, trial.layout, trial.source.source, None) for trial in state.waiting]
        return [
            StudyTrial(params=self._params(layout), result=result, source=source, label=layout.label())
            for _, layout, source, result in sorted([*ended, *waiting], key=lambda record: record[0])
        ]

    def _params(self, layout: Layout) -> dict[str, Any]:
        """A layout as Optuna's parameters: the knobs that vary."""
        return {knob: getattr(layout, knob) for knob in self._space}

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        """Give up the study, with a warning, if Optuna or its database fails in any way."""
        try:
            yield
        except Exception as error:
            self._study = None
            logging.getLogger(__name__).warning(
                "%s: cannot be written (%s); the sweep goes on, and builds the study anew when it is started again",
                self._path,
                error,
            )


class _Backlog:
    """Work that a thread does in order. The thread ends with the process."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._done = threading.Event()
        threading.Thread(target=self._run, name="study", daemon=True).start()

    def add(self, work: Callable[[], None]) -> None:
        """Have some work done after all other work."""
        self._work.put(work)

    def wait(self, patience_s: float) -> None:
        """Wait until all work is done, at most `patience_s` seconds."""
        self.add(self._done.set)
        self._done.wait(patience_s)

    def _run(self) -> None:
        while True:
            self._work.get()()


def distributions(table: pd.DataFrame, tried: Sequence[Layout] = ()) -> dict[str, BaseDistribution]:
    """A categorical distribution for each knob that takes more than one value in the table and the tried layouts."""
    space: dict[str, BaseDistribution] = {}
    for knob in KNOBS:
        values = {value.item() if isinstance(value, np.generic) else value for value in table[knob].unique()}
        values |= {getattr(layout, knob) for layout in tried}
        if len(values) > 1:
            space[knob] = CategoricalDistribution(sorted(values))
    return space


def open_study(
    path: Path, name: str, space: Mapping[str, BaseDistribution], trials: Sequence[StudyTrial]
) -> optuna.Study:
    """Open the study at `path` (SQLite), holding exactly `trials`, numbered from 0 in their order.

    A study that differs, or cannot be read, is written anew: the trial folders are the truth.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    frozen = [_frozen(trial, space) for trial in trials]
    study = _load(path, name)
    if study is None or [_essence(t) for t in study.get_trials(deepcopy=False)] != [
        _essence(t) for t in frozen
    ]:
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        study = optuna.create_study(
            study_name=name, storage=_storage(path), sampler=RandomSampler(), direction="minimize"
        )
        study.add_trials(frozen)
    return study


def _load(path: Path, name: str) -> optuna.Study | None:
    if not path.exists():
        return None
    try:
        return optuna.load_study(study_name=name, storage=_storage(path), sampler=RandomSampler())
    except Exception:  # a torn or foreign file fails in any of SQLite's, SQLAlchemy's and Optuna's ways
        logging.getLogger(__name__).warning("%s: cannot be read; rebuilding it from the trial folders", path)
        return None


class _Unsynced(sqlite3.Connection):
    """A connection that leaves it to the kernel when to write to the disk.

    Optuna commits about twenty times per trial, and would wait for the disk each time. A killed tuner loses nothing. A
    study that a power loss tears differs from the trial folders, and is rebuilt from them.
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
