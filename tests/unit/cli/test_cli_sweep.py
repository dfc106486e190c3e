"""`megatune sweep` and `megatune trial`: dry runs, and how a sweep that ended early is taken up again."""

import json
from pathlib import Path

import pytest

from tests.replay import LoggedTracker, ReplayLauncher
from tests.unit.cli.commands import SWEEP, write
from tuner.cli.app import run
from tuner.trial.contract import Outcome


def test_dry_runs_print_one_command_and_start_nothing(
    sweep_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["sweep", sweep_file, "--dry-run"], ["trial", sweep_file, "tp=2", "--dry-run"]):
        assert run(arguments) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert "launchers.local.agent" in line
        assert "--nproc-per-node=2" in line
        assert line.startswith("cd ")
    assert run(["trial", sweep_file, "tp=2", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 2
    assert not Path("results").exists()


def test_a_dry_run_needs_none_of_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = {**SWEEP["workload"], "precision": "bf16"}
    path = write(tmp_path / "h100.yaml", {**SWEEP, "workload": workload, "cluster": "dgx-h100"})
    assert run(["sweep", path, "--dry-run", "--results", "a [bold]folder"]) == 0
    out = capsys.readouterr().out
    assert "--nproc-per-node=8" in out
    assert "a [bold]folder/night" in out, "brackets of a path are no markup"


def test_a_machine_that_keeps_failing_ends_the_sweep_with_code_4_and_the_same_command_goes_on(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = ReplayLauncher(script={1: [Outcome.INFRASTRUCTURE] * 3})
    monkeypatch.setattr("launchers.local.torchrun.TorchrunLauncher", lambda **_: launcher)
    monkeypatch.setattr("launchers.tracking.Tracker.open", lambda *_: LoggedTracker())
    monkeypatch.setattr("tuner.sweep.controller.RETRY_S", 0.0)
    command = ["sweep", write(tmp_path / "sweep.yaml", SWEEP), "--results", str(results)]
    assert run(command) == 4
    out, err = capsys.readouterr()
    assert "trial 0 [baseline] tp1 pp1 mbs1: " in err
    assert "trial 1: attempt 3" in err
    assert "error: 3 infrastructure failures in a row: the machine keeps failing" in err
    assert "Traceback" not in err
    assert "Stopped early: 3 infrastructure failures in a row." in " ".join(out.split())

    assert run(command) == 0
    out, err = capsys.readouterr()
    assert "1 trials done" in err
    assert "3/3 trials | best " in err
    assert launcher.numbers == [0, 1, 1, 1, 1, 2]
    assert "Finished: the budget of trials is used." in " ".join(out.split())
    assert "++model.tensor_model_parallel_size=" in out
    assert f"megatune sweep {command[1]} --results {results}" in out
