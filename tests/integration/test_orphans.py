"""However a tuner dies, its running trial dies with it."""

import signal
from pathlib import Path

import pytest

from tests.orphans import DEATHS, PROGRAMS, kill_tuner


@pytest.mark.parametrize(
    ("program", "number"),
    [*((program, signal.SIGKILL) for program in PROGRAMS), *(("command", number) for number in DEATHS[1:])],
)
def test_no_process_of_a_trial_outlives_its_tuner(
    program: str, number: signal.Signals, tmp_path: Path
) -> None:
    aftermath = kill_tuner(program, number, tmp_path)
    assert aftermath.began >= 3
    assert aftermath.orphans == 0
