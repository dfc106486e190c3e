"""`megatune explain` judges one layout of a sweep file, or says what the trials of a sweep taught."""

import json
from pathlib import Path

import pytest

from tests.replay import sweep_of
from tests.unit.cli.commands import refused, write_results
from tuner.analysis.figures import best_trial
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.files import to_data
from tuner.trial.finished import read_trials


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
    trials = read_trials(measured)
    assert run(["explain", str(measured)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(f"t{trial.number:04d}" in out for trial in trials)
    assert max(map(len, out.splitlines())) <= 120
    winner = best_trial(trials)
    assert winner is not None
    assert f"One step from the best: {winner.layout.label()}" in out
    assert "Predicted against measured" in out
    assert "Where the best layout's step and memory go" in out
    completed = sum(trial.result.metrics is not None for trial in trials)
    assert completed < 8
    assert f"Shares need 8 measured trials at least; there are {completed}." in " ".join(out.split())

    assert run(["explain", str(measured), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["best"] == winner.number
    for shown, trial in zip(data["trials"], trials, strict=True):
        assert shown["layout"] == to_data(trial.layout)
        assert shown["measured_ms"] == (trial.result.metrics.step_time_ms if trial.result.metrics else None)
        assert shown["predicted_ms"] > 0
        assert 0 <= shown["predicted_fit"] <= 1
    assert sum(shown["measured_ms"] is not None for shown in data["trials"]) == completed
    assert data["step_time"]["trials"] == data["peak_memory"]["trials"] == completed
    assert data["importances"] == {}
    assert {shown["known"] for shown in data["neighbours"]} >= {"predicted"}
    # No command that reads a results folder writes into it.
    assert {path: path.stat().st_mtime_ns for path in measured.rglob("*")} == before


def test_explain_tells_which_knobs_mattered_from_eight_measured_trials_on(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = [
        Layout(tp=tp, pp=pp, micro_batch_size=mbs) for tp in (1, 2, 4) for pp in (1, 2) for mbs in (1, 2)
    ]
    write_results(results, sweep_of(), layouts)
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
    assert "is a sweep file: name the layout" in refused(capsys, "explain", sweep_file)
    message = refused(capsys, "explain", "nowhere", "tp=1")
    assert "nowhere: there is no such sweep file or results folder (nor results/nowhere)" in message


@pytest.mark.parametrize(
    ("words", "message"),
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
def test_a_layout_that_cannot_be_read_is_refused(
    sweep_file: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(capsys, "explain", sweep_file, *words)
