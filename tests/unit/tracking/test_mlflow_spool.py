"""The spool says what MLflow should hold, from the trial folders alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.trials import completed_row, failed_row, write_trial
from tuner.errors import InputError
from tuner.tracking.spool import Spool, SweepClosing, note_end, note_start

ENDED = SweepClosing(status="FINISHED", ended_ms=1_772_330_000_000, summary="# night\n")


def test_an_entry_is_a_finished_trial_whose_record_changes_with_its_result(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    write_trial(tmp_path, failed_row(1))
    write_trial(tmp_path, completed_row(0, 100.0))
    (tmp_path / "trials" / "t0002").mkdir()
    entries, problems = spool.entries()
    assert [entry.trial.number for entry in entries] == [0, 1]
    assert problems == []
    write_trial(tmp_path, replace(completed_row(1, 80.0), layout=failed_row(1).layout))
    unchanged, changed = spool.entries()[0]
    assert unchanged is entries[0], "a trial that has not changed is not read again"
    assert changed.record != entries[1].record
    assert changed.trial.result.metrics is not None


def test_a_trial_that_cannot_be_read_is_a_problem_and_hides_no_other(tmp_path: Path) -> None:
    write_trial(tmp_path, completed_row(0, 100.0)).spec.write_text("{")
    write_trial(tmp_path, completed_row(1, 90.0))
    entries, (problem,) = Spool(tmp_path).entries()
    assert [entry.trial.number for entry in entries] == [1]
    assert "t0000/spec.json: is not JSON" in problem


def test_the_end_is_noted_until_the_sweep_starts_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.end() is None
    note_end(tmp_path, ENDED)
    assert spool.end() == ENDED
    note_start(tmp_path)
    assert spool.end() is None
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        spool.end()
