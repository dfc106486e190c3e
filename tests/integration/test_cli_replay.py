"""A trial is run again from its record alone."""

from pathlib import Path

import pytest

from tests.trials import failed_row, gloo_trial, metrics_of, spec_of
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.files import read_json, write_json
from tuner.trial.contract import Outcome, TrialFolder, TrialResult


def test_a_trial_is_run_again_from_its_folder_and_differences_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The bound is one of the sweep, which does not apply to the rerun.
    spec = gloo_trial(steps=2, number=7, give_up_above_ms=1e-6)
    recorded, rerun = TrialFolder(tmp_path / "t0007"), TrialFolder(tmp_path / "again")
    recorded.path.mkdir()
    write_json(recorded.spec, spec)
    before = TrialResult(outcome=Outcome.COMPLETED, reason="measured", metrics=metrics_of(0.001, 0.0001))
    write_json(recorded.result, before)
    assert run(["replay", str(recorded.path), "--folder", str(rerun.path)]) == 3
    assert read_json(TrialResult, rerun.result).outcome is Outcome.COMPLETED
    assert read_json(TrialResult, recorded.result) == before
    printed = capsys.readouterr().out
    assert "trial t0007 of night: tp1 pp2 mbs1" in printed
    assert "outcome: completed, now completed" in printed
    assert "the 95% intervals of the step time are apart" in printed


def test_a_rerun_into_the_folder_of_its_record_is_refused(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    write_json(folder.spec, spec_of(0, Layout()))
    write_json(folder.result, failed_row(0, Outcome.OOM).result)
    assert run(["replay", str(tmp_path), "--folder", str(tmp_path)]) == 2
