"""The trials of a sweep are read from its folders; a folder that no sweep leaves behind is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trials import write_trial
from tests.unit.nights import NIGHT
from tuner.errors import InputError
from tuner.trial.finished import read_trials, trial_folder


def test_trials_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    for trial in reversed(NIGHT):
        write_trial(tmp_path, trial)
    assert read_trials(tmp_path) == NIGHT


def test_a_folder_without_a_result_is_no_finished_trial(tmp_path: Path) -> None:
    write_trial(tmp_path, NIGHT[0])
    write_trial(tmp_path, NIGHT[1]).result.unlink()
    assert [trial.number for trial in read_trials(tmp_path)] == [0]


def test_a_sweep_that_has_not_begun_has_no_finished_trials(tmp_path: Path) -> None:
    assert read_trials(tmp_path) == []


@pytest.mark.parametrize("name", ["spec.json", "source.json", "result.json"])
@pytest.mark.parametrize("damage", ["torn", "foreign", "binary"])
def test_the_error_names_a_damaged_file(tmp_path: Path, name: str, damage: str) -> None:
    path = write_trial(tmp_path, NIGHT[0]).path / name
    if damage == "torn":
        path.write_text(path.read_text()[:-20])
    elif damage == "foreign":
        path.write_text('{"unheard_of": 1}')
    else:
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_trials(tmp_path)


def test_a_copied_folder_is_refused(tmp_path: Path) -> None:
    folder = write_trial(tmp_path, NIGHT[0])
    folder.path.rename(trial_folder(tmp_path, 7).path)
    with pytest.raises(InputError, match=r"'number' is 0, but the folder is t0007"):
        read_trials(tmp_path)


def test_trials_with_five_digits_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10_000, 9_999, 2):
        write_trial(tmp_path, replace(NIGHT[0], number=number))
    assert [trial.number for trial in read_trials(tmp_path)] == [2, 9_999, 10_000]
