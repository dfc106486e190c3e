"""Whatever instant a tuner dies at, the next one ends with the table of a tuner that never died."""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.replay import ReplayLauncher, loop_of, sweep_of
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import SweepFolder
from tuner.sweep.state import attempts_spent
from tuner.trial.contract import Heartbeat, Outcome, TrialResult
from tuner.trial.finished import read_trials
from tuner.trial.launcher import LaunchPlan

_CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove"})
"""What changes the names of a folder. A file's content counts only from its renaming on."""
_watchers: list[Callable[[str], None]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event in _CHANGES:
        for watcher in tuple(_watchers):
            watcher(str(arguments[0]))


sys.addaudithook(_audit)  # Python has no way to remove one: it stays, and watches nothing


@contextmanager
def snapshots(of: Path, into: Path) -> Iterator[list[Path]]:
    """Copy a folder right before each change of its names: what a tuner that died there would leave."""
    taken: list[Path] = []

    def look(path: str) -> None:
        if Path(path).is_relative_to(of) and of.exists():
            _watchers.remove(look)
            taken.append(shutil.copytree(of, into / f"{len(taken)}"))
            _watchers.append(look)

    _watchers.append(look)
    try:
        yield taken
    finally:
        _watchers.remove(look)


class FlakyLauncher(ReplayLauncher):
    """The first attempt of trial 0 loses its connection, and both attempts of trial 1."""

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """See ReplayLauncher."""
        attempt = json.loads(plan.files["spec.json"])["attempt"]
        failing = {0: attempt == 1, 1: True}
        self.script = {number: [Outcome.COMMUNICATION] * 9 for number, fails in failing.items() if fails}
        return super().run(plan, stop, on_heartbeat)


def the_sweep() -> Sweep:
    return sweep_of(knobs={"tp": [1, 2, 4], "pp": [1, 2]}, budget={"trials": 2})


def to_end(results: Path) -> ReplayLauncher:
    launcher = FlakyLauncher()
    loop_of(results, launcher, the_sweep()).run(threading.Event())
    return launcher


def table(results: Path) -> list[tuple[Any, ...]]:
    return [
        (row.number, row.source, row.layout, row.result.outcome, row.result.metrics)
        for row in read_trials(results)
    ]


def test_from_every_instant_of_a_sweep_the_next_tuner_ends_with_the_same_table(results: Path) -> None:
    whole, copies = results / "whole", results / "copies"
    copies.mkdir(parents=True)
    with snapshots(whole, copies) as taken:
        launched = [(spec.number, spec.attempt) for spec in to_end(whole).launched]
    expected = table(whole)
    assert launched == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [row[3] for row in expected] == [Outcome.COMPLETED, Outcome.COMMUNICATION]
    assert len(taken) >= 6 * len(launched)
    for died in taken:
        over = {
            row.number
            for row in read_trials(died)
            if attempts_spent(_attempt(SweepFolder(died), row.number), row.result) is None
        }
        again = [(spec.number, spec.attempt) for spec in to_end(died).launched]
        assert table(died) == expected, died
        assert again == launched[len(launched) - len(again) :], "an attempt that had ended was run again"
        assert over.isdisjoint(number for number, _ in again)


def _attempt(folder: SweepFolder, number: int) -> int:
    attempt: int = json.loads(folder.trial(number).spec.read_text())["attempt"]
    return attempt


@pytest.mark.parametrize(
    ("attempt", "outcome", "spent"),
    [
        (1, None, 0),
        (2, None, 1),
        (1, Outcome.INTERRUPTED, 0),
        (2, Outcome.INTERRUPTED, 1),
        (1, Outcome.HANG, 1),
        (1, Outcome.COMMUNICATION, 1),
        (2, Outcome.COMMUNICATION, None),
        (3, Outcome.INFRASTRUCTURE, 0),
        (1, Outcome.OOM, None),
        (1, Outcome.UNEXPLAINED, None),
        (1, Outcome.NAN, None),
        (1, Outcome.TOO_SLOW, None),
    ],
)
def test_a_trial_goes_on_with_the_attempt_that_was_due(
    attempt: int, outcome: Outcome | None, spent: int | None
) -> None:
    result = None if outcome is None else TrialResult(outcome=outcome, reason="")
    assert attempts_spent(attempt, result) == spent


@pytest.mark.parametrize(("attempt", "spent"), [(1, 1), (2, None)])
def test_a_trial_that_ran_out_of_memory_beside_others_has_a_second_attempt(
    attempt: int, spent: int | None
) -> None:
    others = ("others held 20.00 GiB of GPU 0 (processes: 77)",)
    result = TrialResult(outcome=Outcome.OOM, reason="", occupied_gpus=others)
    assert attempts_spent(attempt, result) == spent
