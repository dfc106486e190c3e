"""The index beside the trial folders changes how fast they are read, and never what is read."""

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trials import completed_row, failed_row, write_trial
from tests.unit.nights import NIGHT
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import read_json, write_json
from tuner.trial import finished
from tuner.trial.contract import Outcome, RankRecord, TrialFolder, TrialResult
from tuner.trial.finished import INDEX, FinishedTrial, read_trials, trial_folder

RANKS = tuple(RankRecord(rank=rank, host="node", phase="teardown", step=9) for rank in range(2))


@pytest.fixture(autouse=True)
def _index_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sweeps have an index too, and every change brings it up to date."""
    monkeypatch.setattr(finished, "MOST_UNINDEXED", 0)
    monkeypatch.setattr(finished, "MOST_UNINDEXED_SHARE", 0.0)


@pytest.fixture
def night(results: Path) -> Path:
    """The results of a few trials, with an index."""
    for trial in NIGHT:
        write_trial(results, replace(trial, result=replace(trial.result, ranks=RANKS)))
    read_trials(results)
    assert (results / INDEX).exists()
    return results


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose files are read, in order."""
    folders: list[Path] = []
    read_trial = finished.read_trial

    def noted(folder: TrialFolder) -> FinishedTrial:
        folders.append(folder.path)
        return read_trial(folder)

    monkeypatch.setattr(finished, "read_trial", noted)
    return folders


def _from_folders(results: Path) -> list[FinishedTrial]:
    return [finished.read_trial(trial_folder(results, number)) for number in range(len(NIGHT))]


def _measure_again(results: Path, number: int) -> None:
    """Replace the result of a trial, as another attempt at it does."""
    path = trial_folder(results, number).result
    write_json(path, replace(read_json(TrialResult, path), reason="measured again"))


def test_the_index_gives_what_the_folders_hold(night: Path, opened: list[Path]) -> None:
    trials = read_trials(night)
    assert opened == []
    assert trials == _from_folders(night)
    assert all(trial.result.ranks == RANKS for trial in trials)


def test_trials_without_their_ranks_are_the_same_with_and_without_an_index(night: Path) -> None:
    without_ranks = [replace(trial, result=replace(trial.result, ranks=())) for trial in _from_folders(night)]
    assert read_trials(night, with_ranks=False) == without_ranks
    (night / INDEX).unlink()
    assert read_trials(night, with_ranks=False) == without_ranks
    assert read_trials(night) == _from_folders(night)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_is_read_back(results: Path, outcome: Outcome) -> None:
    row = completed_row(0, 100.0) if outcome is Outcome.COMPLETED else failed_row(0, outcome)
    write_trial(
        results, replace(row, layout=Layout(tp=2, pipeline_model_parallel_layout="Et|tL"), note="é\n")
    )
    assert read_trials(results) == read_trials(results)
    assert (results / INDEX).exists()


def test_only_a_trial_that_changed_is_read_again(night: Path, opened: list[Path]) -> None:
    _measure_again(night, 1)
    assert read_trials(night)[1].result.reason == "measured again"
    assert opened == [trial_folder(night, 1).path]
    read_trials(night)
    assert len(opened) == 1


def test_a_trial_that_is_gone_is_not_read(night: Path) -> None:
    trial_folder(night, 1).result.unlink()
    assert [trial.number for trial in read_trials(night)] == [0, *range(2, len(NIGHT))]


def test_a_copied_folder_is_read_anew(night: Path, opened: list[Path]) -> None:
    copy = night.parent / "copy"
    shutil.copytree(night, copy, copy_function=shutil.copyfile)
    assert read_trials(copy) == _from_folders(night)
    assert len(set(opened)) > len(NIGHT)


def test_a_torn_result_is_refused_although_the_index_knows_the_trial(night: Path) -> None:
    path = trial_folder(night, 0).result
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"t0000/result\.json"):
        read_trials(night)


def test_a_trial_folder_under_another_name_is_refused(night: Path) -> None:
    trial_folder(night, 1).path.rename(trial_folder(night, 9).path)
    with pytest.raises(InputError, match="'number' is 1, but the folder is t0009"):
        read_trials(night)


def _with(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as database, database:
            database.executescript(statement)

    return change


def _endless(path: Path) -> None:
    """Put a view in the place of the table, whose query never ends."""
    numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n"
    columns = "x AS name, x AS stamp, x AS trial, x AS ranks"
    _with(f"DROP TABLE trials; CREATE VIEW trials AS SELECT {columns} FROM ({numbers})")(path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))
    path.symlink_to("elsewhere.db")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"no database" * 1000), id="foreign"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5000]), id="torn"),
        pytest.param(_pipe, id="pipe"),
        pytest.param(_folder, id="folder"),
        pytest.param(_link, id="link"),
        pytest.param(_endless, id="endless view"),
        pytest.param(_with("CREATE TABLE more (a)"), id="another table"),
        pytest.param(_with("CREATE TRIGGER t AFTER UPDATE ON trials BEGIN SELECT 1; END"), id="trigger"),
        pytest.param(_with("PRAGMA user_version = 999"), id="another version"),
        pytest.param(_with("UPDATE trials SET stamp = 1"), id="stamps"),
        pytest.param(_with("UPDATE trials SET trial = 'words'"), id="texts for bytes"),
        pytest.param(_with("UPDATE trials SET trial = x'7b7d'"), id="no trial"),
        pytest.param(_with("UPDATE trials SET trial = x'7b7d2c7b7d'"), id="two trials for one"),
        pytest.param(_with("UPDATE trials SET ranks = x'31'"), id="no ranks"),
        pytest.param(_with("UPDATE trials SET ranks = x'5b5d2c5b5d'"), id="ranks of two"),
        pytest.param(
            _with("UPDATE trials SET trial = (SELECT max(trial) FROM trials)"), id="one trial for all"
        ),
    ],
)
def test_an_index_that_cannot_be_used_is_as_good_as_none(night: Path, damage: Callable[[Path], None]) -> None:
    damage(night / INDEX)
    assert read_trials(night) == _from_folders(night)
    assert read_trials(night) == _from_folders(night)


def test_words_from_an_index_of_somebody_else_are_printable(night: Path) -> None:
    with closing(sqlite3.connect(night / INDEX)) as database, database:
        trial = bytes(database.execute("SELECT trial FROM trials WHERE name = 't0000'").fetchone()[0])
        hostile = trial.replace(b'"reason":"', b'"reason":"\\u001b[2J\\u202e')
        assert hostile != trial
        database.execute("UPDATE trials SET trial = ? WHERE name = 't0000'", (hostile,))
    assert read_trials(night)[0].result.reason.startswith("\\x1b[2J\\u202e")


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in NIGHT:
        write_trial(results, trial)

    def refused(*arguments: object, **keys: object) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(sqlite3, "connect", refused)
    assert read_trials(results) == NIGHT
    assert [path.name for path in results.iterdir()] == ["trials"]


def test_several_readers_and_writers_at_once_read_what_the_folders_hold(results: Path) -> None:
    for number in range(30):
        write_trial(results, replace(NIGHT[0], number=number))
    wanted, read = read_trials(results), list[list[FinishedTrial]]()

    def read_and_spoil() -> None:
        for _ in range(10):
            read.append(read_trials(results))
            (results / INDEX).unlink(missing_ok=True)

    threads = [threading.Thread(target=read_and_spoil) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 40
    assert all(trials == wanted for trials in read)
    assert {path.name for path in results.iterdir()} <= {"trials", INDEX}


def test_a_short_sweep_has_no_index(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for trial in NIGHT:
        write_trial(results, trial)
    assert read_trials(results) == NIGHT
    assert not (results / INDEX).exists()
