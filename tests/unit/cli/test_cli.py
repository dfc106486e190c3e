"""The command line in-process: what goes to stdout, what a mistake says, and every exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.replay import NoTracker, ReplayLauncher, loop_of, run_to_end, sweep_of
from tuner.analysis.figures import best
from tuner.cli.app import run
from tuner.files import to_data
from tuner.report.export import Format
from tuner.rules import RULES
from tuner.space.enumeration import REFINED
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome
from tuner.trial.finished import read_trials

SWEEP: dict[str, Any] = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 128, "global_batch_size": 8, "precision": "fp32"},
    "cluster": {"name": "cpu-4", "gpus_per_node": 2},
    "knobs": {"tp": [1, 2], "pp": [1, 2], "micro_batch_size": [1, 2]},
    "budget": {"trials": 3},
}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No results of ours lie where the commands look, and no server is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
    return _write(tmp_path / "sweep.yaml", SWEEP)


@pytest.fixture(scope="session")
def measured(in_memory: Path) -> Path:
    """A finished sweep of the test model, with a stated baseline, two OOMs and a crash."""
    results = in_memory / "measured"
    launcher = ReplayLauncher(limit_gib=60.0, script={3: [Outcome.INVALID]})
    run_to_end(results, launcher, sweep_of(baseline={"tp": 4, "pp": 2}, recipe="mine"))
    return results


def _write(path: Path, data: Any) -> str:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return str(path)


def _megatune(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from tuner.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
    )


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must be refused with a message of its own; returns the message."""
    assert run(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "internal error" not in err
    return " ".join(err.split())


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


def test_plan_shows_what_varies_in_each_stage_of_a_default_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {key: value for key, value in SWEEP.items() if key != "knobs"}
    path = _write(tmp_path / "default.yaml", {**named, "budget": {"trials": 20}})
    assert run(["plan", path, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["stages"]
    assert (first["trials"], second["trials"]) == (7, 4), "of 11, where finals take 9"
    assert {"tp", "pp", "micro_batch_size"} <= set(first["knobs"])
    assert "overlap_grad_reduce" in second["knobs"]
    assert set(second["knobs"]) <= set(REFINED)
    assert second["around"] == 3
    assert second["layouts"] > 0
    assert run(["plan", path]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "around the best 3 grids of stage 1" in told
    assert f"{second['layouts']} around the predicted best" in told

    assert run(["plan", _write(tmp_path / "named.yaml", SWEEP), "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["stages"]
    assert set(only["knobs"]) <= {*SWEEP["knobs"], "overlap_p2p_comm"}


def test_explain_says_valid_with_the_derived_sizes(
    sweep_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", sweep_file, "tp=2", "sp=true", "micro_batch_size=2"]) == 0
    assert "valid: breaks no rule" in capsys.readouterr().out
    assert run(["explain", sweep_file, "pp=2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["valid"]
    assert data["broken"] == []
    assert data["derived"] == {"world_size": 2, "min_gpus": 2, "dp": 1, "edp": 1, "num_microbatches": 8}


def test_explain_names_every_broken_rule(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", sweep_file, "tp=3", "pp=5", "vpp=2"]
    assert run([*arguments, "--json"]) == 2
    broken = [item["rule"] for item in json.loads(capsys.readouterr().out)["broken"]]
    assert {"dense-grid", "heads-by-tp", "layers-by-pp"} <= set(broken)
    assert run(arguments) == 2
    out = capsys.readouterr().out
    assert all(f"{rule} (" in out for rule in broken)
    assert out.count("source: ") == len(broken)


def test_explain_tells_what_the_trials_of_a_sweep_say(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in measured.rglob("*")}
    rows = read_trials(measured)
    assert run(["explain", str(measured)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(f"t{row.number:04d}" in out for row in rows)
    assert max(map(len, out.splitlines())) <= 120
    winner = best(rows)
    assert winner is not None
    assert f"One step from the best: {winner.layout.label()}" in out
    assert "Predicted against measured" in out
    assert "Where the best layout's step and memory go" in out

    assert run(["explain", str(measured), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["best"] == winner.number
    for told, row in zip(data["trials"], rows, strict=True):
        assert told["layout"] == to_data(row.layout)
        assert told["measured_ms"] == (row.result.metrics.step_time_ms if row.result.metrics else None)
        assert told["predicted_ms"] > 0
        assert 0 <= told["predicted_fit"] <= 1
    completed = [told for told in data["trials"] if told["measured_ms"]]
    assert data["step_time"]["trials"] == data["peak_memory"]["trials"] == len(completed)
    assert {told["known"] for told in data["neighbours"]} >= {"predicted"}
    # Nothing is ever written into the folder.
    assert {path: path.stat().st_mtime_ns for path in measured.rglob("*")} == before


def test_explain_says_from_how_many_trials_shares_are_told(
    measured: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    completed = sum(row.result.metrics is not None for row in read_trials(measured))
    assert completed < 8
    assert run(["explain", str(measured)]) == 0
    told = f"Shares need 8 measured trials at least; there are {completed}."
    assert told in " ".join(capsys.readouterr().out.split())
    assert run(["explain", str(measured), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["importances"] == {}
    run_to_end(results, ReplayLauncher(), sweep_of(budget={"trials": 12, "min_gain": None}))
    assert run(["explain", str(results)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Which knobs mattered, in the 12 measured trials" in out
    assert "Shares need" not in out


def test_explain_tells_what_a_sweep_expects_of_a_layout(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = read_trials(measured)[0]
    assert tried.result.metrics is not None
    words = [f"tp={tried.layout.tp}", f"pp={tried.layout.pp}"]
    assert run(["explain", str(measured), *words]) == 0
    out = capsys.readouterr().out
    assert "valid: breaks no rule" in out
    assert f"trial 0: measured {tried.result.metrics.step_time_ms:,.1f} ms" in out
    assert "P(fit)" in out
    assert run(["explain", str(measured), "pp=2", "cp=2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["derived"]["dp"] == 2
    assert data["trials"] == []
    parts = data["prediction"]["step"].values()
    assert sum(parts) == pytest.approx(data["prediction"]["predicted_ms"])
    assert run(["explain", str(measured), "tp=3", "--json"]) == 2
    assert not json.loads(capsys.readouterr().out)["valid"]


def test_explain_needs_a_layout_for_a_sweep_file_and_something_that_is_there(
    sweep_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a sweep file: name the layout" in _refused(capsys, "explain", sweep_file)
    told = _refused(capsys, "explain", "nowhere", "tp=1")
    assert "nowhere: there is no such sweep file or results folder (nor results/nowhere)" in told


def test_show_lists_what_pruning_removed_and_by_which_trial(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_to_end(results, ReplayLauncher(limit_gib=30.0), sweep_of(budget={"trials": 20}))
    rows = read_trials(results)
    ooms = {row.number: row.layout for row in rows if row.result.outcome is Outcome.OOM}
    assert run(["show", str(results), "--pruned", "--json"]) == 0
    pruned = json.loads(capsys.readouterr().out)["pruned"]
    assert pruned
    tried = [to_data(row.layout) for row in rows]
    for row in pruned:
        assert row["reason"] == "needs as much as an OOM"
        layout = to_data(ooms[row["trial"]])
        moved = {knob for knob, value in row["layout"].items() if value != layout[knob]}
        assert moved and row["along"]
        assert ("micro_batch_size" in moved) == ("micro_batch_size" in row["along"])
        assert row["layout"] not in tried
    assert run(["show", str(results), "--pruned"]) == 0
    out = capsys.readouterr().out
    assert f"{len(pruned)} of 34 valid layouts are never launched" in out
    assert f"{len(pruned)} needs as much as an OOM" in out


def test_plan_lists_what_is_predicted_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {"name": "cpu-4", "gpus_per_node": 2, "memory_gib": 0.03}
    path = _write(tmp_path / "small.yaml", {**SWEEP, "cluster": cluster, "baseline": {"pp": 2}})
    assert run(["plan", path, "--pruned", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["pruned"]) == data["predicted_too_large"] > 0
    assert all(row["fit"] < 0.01 and row["predicted_gib"] > 0.03 for row in data["pruned"])
    assert all(row["trial"] is None for row in data["pruned"])
    assert run(["plan", path, "--pruned"]) == 0
    assert f"{len(data['pruned'])} predicted too large" in capsys.readouterr().out
    assert run(["plan", path, "--json"]) == 0
    assert "pruned" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tp"], "'tp': write a knob as NAME=VALUE"),
        (["tp=x"], "key 'tp': should be a valid integer, not \"x\""),
        (["tp="], "key 'tp': should be a valid integer, not empty"),
        (["tp=[1"], "'tp=[1': the value cannot be read"),
        (["ttp=2"], "unknown key 'ttp' (did you mean 'tp'?)"),
        (["tp=0"], "tp must be at least 1, not 0"),
        (["tp=1", "tp=2"], "'tp=2': tp is given twice"),
    ],
)
def test_a_layout_that_cannot_be_read_is_told(
    sweep_file: str, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert told in _refused(capsys, "explain", sweep_file, *words)


def test_dry_runs_print_one_command_and_start_nothing(
    sweep_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["sweep", sweep_file, "--dry-run"], ["trial", sweep_file, "tp=2", "--dry-run"]):
        assert run(arguments) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert "torch.distributed.run" in line
        assert "--nproc-per-node=2" in line
        assert line.startswith("cd ")
    assert run(["trial", sweep_file, "tp=2", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 2
    assert not Path("results").exists()


def test_a_dry_run_needs_none_of_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = {**SWEEP["workload"], "precision": "bf16"}
    path = _write(tmp_path / "h100.yaml", {**SWEEP, "workload": workload, "cluster": "dgx-h100"})
    assert run(["sweep", path, "--dry-run", "--results", "a [bold]folder"]) == 0
    out = capsys.readouterr().out
    assert "--nproc-per-node=8" in out
    assert "a [bold]folder/night" in out, "brackets of a path are no markup"


def test_show_lists_every_trial(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_trials(measured)
    assert run(["show", str(measured)]) == 0
    out = capsys.readouterr().out
    assert all(f"t{row.number:04d}" in out for row in rows)
    assert "scripted invalid" in " ".join(out.split())
    assert run(["show", str(measured), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    winner = best(rows)
    assert winner is not None
    assert data["best"] == winner.number
    assert data["tied_with_best"][0] == winner.number
    assert [trial["number"] for trial in data["trials"]] == [row.number for row in rows]
    assert data["trials"][winner.number]["layout"] == to_data(winner.layout)
    assert data["trials"][3]["result"]["outcome"] == "invalid"


def test_show_finds_a_sweep_by_its_name(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "night").symlink_to(measured)
    assert run(["show", "night", "--html", "page.html"]) == 0
    out, err = capsys.readouterr()
    assert "t0000" in out
    assert err == "wrote page.html\n"
    assert "Every trial" in Path("page.html").read_text()
    assert "nowhere/page.html: cannot be written" in _refused(
        capsys, "show", "night", "--html", "nowhere/page.html"
    )


@pytest.mark.parametrize("form", list(Format))
def test_export_gives_the_best_layout_in_every_format(
    measured: Path, capsys: pytest.CaptureFixture[str], form: Format
) -> None:
    assert run(["export", str(measured), "--format", form.value]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    winner = best(read_trials(measured))
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
    told = _refused(capsys, "export", str(measured), "--trial", "3")
    assert "--trial 3: did not complete" in told
    assert "--trial 99" in _refused(capsys, "export", str(measured), "--trial", "99")
    assert "cannot be written" in _refused(capsys, "export", str(measured), "-o", "nowhere/override.txt")


def test_export_without_a_completed_trial_has_its_own_code(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_to_end(results, ReplayLauncher(limit_gib=0.1), sweep_of(budget={"trials": 1}))
    assert "no trial completed" in _refused(capsys, "export", str(results), code=3)


def test_init_writes_a_file_that_can_be_planned_and_never_over_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["init"]) == 0
    assert "megatune plan sweep.yaml" in capsys.readouterr().err
    written = Path("sweep.yaml").read_text()
    assert run(["plan", "sweep.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] > 0
    Path("sweep.yaml").write_text("mine")
    assert "sweep.yaml: exists already" in _refused(capsys, "init")
    assert Path("sweep.yaml").read_text() == "mine"
    assert run(["init", "--force"]) == 0
    assert Path("sweep.yaml").read_text() == written
    assert "nowhere/a.yaml: cannot be written" in _refused(capsys, "init", "nowhere/a.yaml")


def test_doctor_finds_what_a_trial_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    status = {check["check"]: check["status"] for check in json.loads(capsys.readouterr().out)}
    needed = ("torch", "megatron-core", "optuna", "mlflow", "megatron imports", "machine", "gloo on loopback")
    assert all(status[name] == "ok" for name in needed)
    assert not list(Path().iterdir())
    Path("file").write_text("")
    assert run(["doctor", "--results", "file/results"]) == 2
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["plan"], ["sweep"], ["explain", "tp=1"], ["trial", "tp=1"]])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("name: [a", "bad.yaml: is not YAML"),
        ({**SWEEP, "budgte": {}}, "bad.yaml: unknown key 'budgte' (did you mean 'budget'?)"),
        ({"name": "night"}, "bad.yaml: missing key 'cluster'"),
        ({**SWEEP, "lift": ["dense-grid"]}, "bad.yaml: lift: 'dense-grid' is no policy"),
    ],
)
def test_a_bad_sweep_file_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], data: Any, told: str
) -> None:
    path = _write(tmp_path / "bad.yaml", data)
    assert told in _refused(capsys, command[0], path, *command[1:])


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_no_valid_layout_is_told_with_the_rules_and_their_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = _write(tmp_path / "none.yaml", {**SWEEP, "knobs": {"tp": [3, 5], "pp": [3, 7]}})
    told = _refused(capsys, command, path)
    assert "none of 8 combinations is a valid layout" in told
    assert "8 tp-inside-nvlink" in told
    assert f"megatune explain {path}" in told


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_an_invalid_baseline_is_told_with_its_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = _write(tmp_path / "bad.yaml", {**SWEEP, "baseline": {"tp": 3}})
    told = _refused(capsys, command, path)
    assert "key 'baseline': tp3 pp1 mbs1 is not a valid layout: dense-grid: world size (2)" in told


def test_an_invalid_layout_is_not_tried(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = _refused(capsys, "trial", sweep_file, "tp=3")
    assert "tp3 pp1 mbs1 is not a valid layout: dense-grid" in told
    assert not Path("results").exists()


@pytest.mark.parametrize("command", [["sweep"], ["trial", "tp=1"]])
def test_more_gpus_than_the_machine_has_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    workload = {**SWEEP["workload"], "global_batch_size": 1024, "precision": "bf16"}
    cluster = {"name": "dgx-h100", "gpus_per_node": 512}
    path = _write(tmp_path / "h100.yaml", {**SWEEP, "workload": workload, "cluster": cluster})
    told = _refused(capsys, command[0], path, *command[1:])
    assert "dgx-h100 is 1 x 512 = 512 GPUs, but this machine has" in told
    assert not Path("results").exists()


def test_several_nodes_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "two.yaml", {**SWEEP, "cluster": {"name": "cpu-4", "nodes": 2}})
    assert "nodes = 2" in _refused(capsys, "sweep", path)
    assert not Path("results").exists()


@pytest.mark.parametrize("folder", ["a-file/results", "/proc/results"])
def test_results_that_cannot_be_written_are_told(
    sweep_file: str, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    Path("a-file").write_text("")
    told = _refused(capsys, "sweep", sweep_file, "--results", folder)
    assert f"{folder}/night: the results folder cannot be written" in told
    told = _refused(capsys, "trial", sweep_file, "tp=1", "--folder", f"{folder}/t")
    assert f"{folder}/t: cannot be written" in told


def test_results_of_another_sweep_are_refused(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    SweepFolder(Path("results/night")).claim(sweep_of())
    told = _refused(capsys, "sweep", sweep_file)
    assert "results/night: holds the results of another sweep; different: cluster." in told
    assert "another folder with --results" in told


def test_a_torn_identity_is_told(sweep_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SweepFolder(Path("results/night"))
    folder.claim(sweep_of())
    folder.identity.write_text("{")
    assert "sweep.json: is not JSON" in _refused(capsys, "sweep", sweep_file)
    assert "sweep.json: is not JSON" in _refused(capsys, "show", "night")


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path / "sweep.yaml", {**SWEEP, "tracking": {"uri": "sqlite:///unused.db"}})
    folder = SweepFolder(Path("results/night"))
    folder.path.mkdir(parents=True)
    with folder.lock():
        assert "results/night: another megatune is running this sweep" in _refused(capsys, "sweep", path)
    assert not Path("unused.db").exists()


def test_a_tracking_uri_that_mlflow_does_not_take_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "sweep.yaml", {**SWEEP, "tracking": {"uri": "./mlruns"}})
    told = _refused(capsys, "sweep", path)
    assert "MLflow at ./mlruns cannot be used" in told
    assert "tracking.uri" in told


@pytest.mark.parametrize("command", ["show", "export", "ui", "sync"])
def test_a_results_folder_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "nowhere: there is no such results folder (nor results/nowhere)" in _refused(
        capsys, command, "nowhere"
    )
    Path("empty").mkdir()
    if command != "export":
        assert "empty: holds no sweep" in _refused(capsys, command, "empty")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plann", "a.yaml"], "No such command 'plann'"),
        (["plan"], "Missing argument"),
        (["plan", "a.yaml", "--jsn"], "No such option: --jsn"),
        (["plan", "a.yaml"], "a.yaml: cannot be read: No such file or directory"),
        (["export", "x", "--format", "xml"], "xml"),
        (["export", "x", "--trial", "one"], "'--trial'"),
        (["ui", "x", "--port", "0"], "--port"),
    ],
)
def test_a_mistake_in_the_command_line_is_told(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert told in _refused(capsys, *arguments)


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        name in out for name in ("init", "plan", "explain", "sweep", "trial", "show", "export", "ui", "sync")
    )
    assert "130" in out
    commands = "init plan explain sweep trial show export ui sync doctor calibrate"
    for command in commands.split():
        assert run([command, "--help"]) == 0


def test_our_own_error_says_so_and_hides_the_traceback(
    sweep_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a [bug] of ours")

    monkeypatch.setattr("tuner.cli.common.seeds", broken)
    assert run(["plan", sweep_file]) == 1
    err = capsys.readouterr().err
    assert "internal error: RuntimeError: a [bug] of ours" in err
    assert "megatune --debug" in err
    assert "Traceback" not in err
    assert run(["--debug", "plan", sweep_file]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_outside_a_trial_is_130(
    sweep_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tuner.cli.common.seeds", interrupted)
    assert run(["plan", sweep_file]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_planning_loads_neither_torch_nor_megatron_nor_mlflow(sweep_file: str) -> None:
    script = (
        "import sys; from tuner.cli.app import run; import tuner.cli\n"
        "early = sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'mlflow', 'optuna'})\n"
        f"code = run(['plan', {sweep_file!r}, '--json'])\n"
        "late = sorted({'torch', 'mlflow', 'megatron'} & set(sys.modules))\n"
        "print(early, late, code, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[] [] 0\n"
    json.loads(done.stdout)


def test_the_program_itself_ends_with_the_code_and_without_a_traceback(tmp_path: Path) -> None:
    done = _megatune("plan", _write(tmp_path / "bad.yaml", "name: [a"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert _megatune().returncode == 2


def test_a_pipe_gets_whole_lines_and_no_colours(sweep_file: str) -> None:
    done = _megatune("explain", sweep_file, "tp=3")
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("dense-grid")]
    assert line.endswith("= 3")


def test_a_loop_that_was_stopped_is_shown_and_exported_as_far_as_it_came(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    loop_of(results, ReplayLauncher(stop_at=2)).run(threading.Event())
    assert run(["show", str(results), "--json"]) == 0
    outcomes = [trial["result"]["outcome"] for trial in json.loads(capsys.readouterr().out)["trials"]]
    assert outcomes == ["completed", "completed", "interrupted"]
    assert run(["export", str(results)]) == 0


def test_a_machine_that_keeps_failing_ends_the_sweep_with_code_4_and_the_same_command_goes_on(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = ReplayLauncher(script={1: [Outcome.INFRASTRUCTURE] * 3})
    monkeypatch.setattr("launchers.local.torchrun.TorchrunLauncher", lambda **_: launcher)
    monkeypatch.setattr("launchers.tracking.Tracker.open", lambda *_: NoTracker())
    command = ["sweep", _write(tmp_path / "sweep.yaml", SWEEP), "--results", str(results)]
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
