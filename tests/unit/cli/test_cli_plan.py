"""`megatune plan` counts the space of a sweep file, and `megatune init` writes a file that it can plan."""

import json
from pathlib import Path

import pytest

from tests.unit.cli.commands import SWEEP, refused, write
from tuner.cli.app import run
from tuner.rules.validity import RULES
from tuner.space.domain import REFINED


def test_plan_counts_the_layouts_the_rejections_and_the_first_trials(
    sweep_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", sweep_file, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    # Each knob twice, and the point-to-point overlap that follows vpp.
    assert data["combinations"] == 16
    assert data["valid"] + sum(data["rejected"].values()) == 16
    assert set(data["rejected"]) <= {rule.id for rule in RULES}
    assert data["queue"][0]["source"] == "baseline"
    assert {"tp", "pp", "micro_batch_size"} <= set(data["queue"][0]["layout"])

    assert run(["plan", sweep_file]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{data['valid']} valid layouts of 16 combinations" in out
    for rule, count in data["rejected"].items():
        assert any(rule in line and f" {count} " in line for line in out.splitlines())
    assert "budget 3 trials" in out
    assert not Path("results").exists()


def test_plan_shows_what_varies_in_the_grid_and_in_the_refinement_of_a_default_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {key: value for key, value in SWEEP.items() if key != "knobs"}
    path = write(tmp_path / "default.yaml", {**named, "budget": {"trials": 20}})
    assert run(["plan", path, "--json"]) == 0
    grid, refinement = json.loads(capsys.readouterr().out)["stages"]
    assert (grid["trials"], refinement["trials"]) == (7, 4), "of 11, where finals take 9"
    assert {"tp", "pp", "micro_batch_size"} <= set(grid["knobs"])
    assert "overlap_grad_reduce" in refinement["knobs"]
    assert set(refinement["knobs"]) <= set(REFINED)
    assert refinement["around"] == 3
    assert refinement["layouts"] > 0
    assert run(["plan", path]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "around the best 3 layouts" in out
    assert f"{refinement['layouts']} around the predicted best" in out

    assert run(["plan", write(tmp_path / "named.yaml", SWEEP), "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["stages"]
    assert set(only["knobs"]) <= {*SWEEP["knobs"], "overlap_p2p_comm"}


def test_plan_lists_what_is_predicted_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {"name": "cpu-4", "gpus_per_node": 2, "memory_gib": 0.03}
    path = write(tmp_path / "small.yaml", {**SWEEP, "cluster": cluster, "baseline": {"pp": 2}})
    assert run(["plan", path, "--pruned", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["pruned"]) == data["predicted_too_large"] > 0
    assert all(row["fit"] < 0.01 and row["predicted_gib"] > 0.03 for row in data["pruned"])
    assert all(row["trial"] is None for row in data["pruned"])
    assert run(["plan", path, "--pruned"]) == 0
    assert f"{len(data['pruned'])} predicted too large" in capsys.readouterr().out
    assert run(["plan", path, "--json"]) == 0
    assert "pruned" not in json.loads(capsys.readouterr().out)


def test_init_writes_a_file_that_can_be_planned_and_never_over_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["init"]) == 0
    assert "megatune plan sweep.yaml" in capsys.readouterr().err
    written = Path("sweep.yaml").read_text()
    assert run(["plan", "sweep.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] > 0
    Path("sweep.yaml").write_text("mine")
    assert "sweep.yaml: exists already" in refused(capsys, "init")
    assert Path("sweep.yaml").read_text() == "mine"
    assert run(["init", "--force"]) == 0
    assert Path("sweep.yaml").read_text() == written
    assert "nowhere/a.yaml: cannot be written" in refused(capsys, "init", "nowhere/a.yaml")
