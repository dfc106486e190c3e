"""What a user can get wrong: each command refuses it with one message that names the place."""

from pathlib import Path
from typing import Any

import pytest

from tests.replay import claim, sweep_of
from tests.unit.cli.commands import SWEEP, refused, write
from tuner.sweep.folder import SweepFolder
from tuner.sweep.lock import hold


@pytest.mark.parametrize("command", [["plan"], ["sweep"], ["explain", "tp=1"], ["trial", "tp=1"]])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("name: [a", "bad.yaml: is not YAML"),
        ({**SWEEP, "budgte": {}}, "bad.yaml: unknown key 'budgte' (did you mean 'budget'?)"),
        ({"name": "night"}, "bad.yaml: missing key 'cluster'"),
        ({**SWEEP, "lift": ["dense-grid"]}, "bad.yaml: lift: 'dense-grid' is no policy"),
    ],
)
def test_a_bad_sweep_file_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], data: Any, message: str
) -> None:
    path = write(tmp_path / "bad.yaml", data)
    assert message in refused(capsys, command[0], path, *command[1:])


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_a_space_without_a_valid_layout_is_refused_with_the_rules_and_their_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = write(tmp_path / "none.yaml", {**SWEEP, "knobs": {"tp": [3, 5], "pp": [3, 7]}})
    message = refused(capsys, command, path)
    assert "none of 8 combinations is a valid layout" in message
    assert "8 tp-inside-nvlink" in message
    assert f"megatune explain {path}" in message


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_an_invalid_baseline_is_refused_with_the_rules_that_it_breaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = write(tmp_path / "bad.yaml", {**SWEEP, "baseline": {"tp": 3}})
    message = refused(capsys, command, path)
    assert "key 'baseline': tp3 pp1 mbs1 is not a valid layout: dense-grid: world size (2)" in message


def test_an_invalid_layout_is_not_tried(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "trial", sweep_file, "tp=3")
    assert "tp3 pp1 mbs1 is not a valid layout: dense-grid" in message
    assert not Path("results").exists()


@pytest.mark.parametrize("command", [["sweep"], ["trial", "tp=1"]])
def test_more_gpus_than_the_machine_has_arerefused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    workload = {**SWEEP["workload"], "global_batch_size": 1024, "precision": "bf16"}
    cluster = {"name": "dgx-h100", "gpus_per_node": 512}
    path = write(tmp_path / "h100.yaml", {**SWEEP, "workload": workload, "cluster": cluster})
    message = refused(capsys, command[0], path, *command[1:])
    assert "dgx-h100 is 1 x 512 = 512 GPUs, but this machine has" in message
    assert not Path("results").exists()


def test_several_nodes_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "two.yaml", {**SWEEP, "cluster": {"name": "cpu-4", "nodes": 2}})
    assert "nodes = 2" in refused(capsys, "sweep", path)
    assert not Path("results").exists()


@pytest.mark.parametrize("folder", ["a-file/results", "/proc/results"])
def test_a_results_folder_that_cannot_be_written_is_refused(
    sweep_file: str, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    Path("a-file").write_text("")
    message = refused(capsys, "sweep", sweep_file, "--results", folder)
    assert f"{folder}/night: the results folder cannot be written" in message
    message = refused(capsys, "trial", sweep_file, "tp=1", "--folder", f"{folder}/t")
    assert f"{folder}/t: cannot be written" in message


def test_results_of_another_sweep_arerefused(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    claim(SweepFolder(Path("results/night")), sweep_of())
    message = refused(capsys, "sweep", sweep_file)
    assert "results/night: holds the results of another sweep; different: cluster." in message
    assert "another folder with --results" in message


def test_a_torn_identity_is_refused(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SweepFolder(Path("results/night"))
    claim(folder, sweep_of())
    folder.identity.write_text("{")
    assert "sweep.json: is not JSON" in refused(capsys, "sweep", sweep_file)
    assert "sweep.json: is not JSON" in refused(capsys, "show", "night")


def test_a_folder_in_use_isrefused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "sweep.yaml", {**SWEEP, "tracking": {"uri": "sqlite:///unused.db"}})
    folder = SweepFolder(Path("results/night"))
    folder.path.mkdir(parents=True)
    with hold(folder.lock):
        assert "results/night: another megatune is running this sweep" in refused(capsys, "sweep", path)
    assert not Path("unused.db").exists()


def test_a_tracking_uri_that_mlflow_does_not_take_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "sweep.yaml", {**SWEEP, "tracking": {"uri": "./mlruns"}})
    message = refused(capsys, "sweep", path)
    assert "MLflow at ./mlruns cannot be used" in message
    assert "tracking.uri" in message


@pytest.mark.parametrize("command", ["show", "export", "ui", "sync"])
def test_a_results_folder_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert "nowhere: there is no such results folder (nor results/nowhere)" in refused(
        capsys, command, "nowhere"
    )
    Path("empty").mkdir()
    if command != "export":
        assert "empty: holds no sweep" in refused(capsys, command, "empty")
