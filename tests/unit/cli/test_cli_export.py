"""`megatune export` prints a measured layout as an override in every format."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from tests.replay import ReplayLauncher, sweep_of
from tests.unit.cli.commands import refused, write_results
from tuner.analysis.figures import best_trial
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.report.export import Format
from tuner.sweep.folder import SweepFolder
from tuner.trial.finished import read_trials


@pytest.mark.parametrize("form", list(Format))
def test_export_gives_the_best_layout_in_every_format(
    measured: Path, capsys: pytest.CaptureFixture[str], form: Format
) -> None:
    assert run(["export", str(measured), "--format", form.value]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    winner = best_trial(read_trials(measured))
    assert winner is not None
    # The baseline is tp4 pp2: what differs from it is stated, a default too.
    assert winner.layout.tp == 2
    spelled = {
        Format.BRIDGE_CLI: "model.tensor_model_parallel_size=2",
        Format.BRIDGE_PYTHON: "tensor_model_parallel_size = 2",
        Format.MEGATRON_LM: "--tensor-model-parallel-size 2",
        Format.BRIDGE_YAML: "tensor_model_parallel_size: 2",
        Format.JSON: '"model.tensor_model_parallel_size": 2',
    }
    assert spelled[form] in out
    if form is Format.JSON:
        json.loads(out)
    if form is Format.BRIDGE_YAML:
        yaml.safe_load(out)


def test_export_of_one_trial_goes_to_a_file(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(measured), "--trial", "0", "-o", "override.txt"]) == 0
    assert capsys.readouterr().out == ""
    assert "trial t0000 of sweep night" in Path("override.txt").read_text()
    message = refused(capsys, "export", str(measured), "--trial", "3")
    assert "--trial 3: did not complete" in message
    assert "--trial 99" in refused(capsys, "export", str(measured), "--trial", "99")
    assert "cannot be written" in refused(capsys, "export", str(measured), "-o", "nowhere/override.txt")


def test_export_without_a_completed_trial_has_its_own_code(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(results, sweep_of(), [Layout()], ReplayLauncher(limit_gib=0.1))
    assert "no trial completed" in refused(capsys, "export", str(results), code=3)


@pytest.mark.parametrize("form", list(Format))
def test_the_line_that_runs_the_trial_again_leaves_its_result_alone(
    measured: Path, capsys: pytest.CaptureFixture[str], form: Format
) -> None:
    moved = measured.rename(measured.with_name("with a blank"))
    assert run(["export", str(moved), "--format", form.value, "--trial", "0"]) == 0
    out = capsys.readouterr().out
    line = json.loads(out)["rerun_command"] if form is Format.JSON else out.partition("run it again: ")[2]
    words = shlex.split(line.splitlines()[0])
    assert words == ["megatune", "replay", str(SweepFolder(moved).trial(0).path)]
    moved.rename(measured)
