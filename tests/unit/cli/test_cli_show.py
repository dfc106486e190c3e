"""`megatune show` lists the trials of a sweep, writes its page, and lists what was never launched."""

import json
from pathlib import Path

import pytest

from tests.replay import ReplayLauncher, sweep_of
from tests.unit.cli.commands import refused, write_results
from tuner.analysis.figures import best_trial
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.files import to_data
from tuner.trial.contract import Outcome
from tuner.trial.finished import read_trials


def test_show_lists_every_trial(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = read_trials(measured)
    assert run(["show", str(measured)]) == 0
    out = capsys.readouterr().out
    assert all(f"t{trial.number:04d}" in out for trial in trials)
    assert "scripted invalid" in " ".join(out.split())
    assert run(["show", str(measured), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    winner = best_trial(trials)
    assert winner is not None
    assert data["best"] == winner.number
    assert data["tied_with_best"][0] == winner.number
    assert [shown["number"] for shown in data["trials"]] == [trial.number for trial in trials]
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
    assert "nowhere/page.html: cannot be written" in refused(
        capsys, "show", "night", "--html", "nowhere/page.html"
    )


def test_show_lists_what_pruning_removed_and_by_which_trial(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = [
        Layout(tp=4, pp=2),
        Layout(tp=2, micro_batch_size=2),
        Layout(micro_batch_size=1),
        Layout(tp=2, pp=2, micro_batch_size=4),
        Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    ]
    write_results(results, sweep_of(), layouts, ReplayLauncher(limit_gib=30.0))
    trials = read_trials(results)
    ooms = {trial.number: trial.layout for trial in trials if trial.result.outcome is Outcome.OOM}
    assert run(["show", str(results), "--pruned", "--json"]) == 0
    pruned = json.loads(capsys.readouterr().out)["pruned"]
    assert pruned
    tried = [to_data(trial.layout) for trial in trials]
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


def test_an_interrupted_sweep_is_shown_and_exported_as_far_as_it_came(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = ReplayLauncher(script={2: [Outcome.INTERRUPTED]})
    write_results(results, sweep_of(), [Layout(), Layout(tp=2), Layout(pp=2)], launcher)
    assert run(["show", str(results), "--json"]) == 0
    outcomes = [trial["result"]["outcome"] for trial in json.loads(capsys.readouterr().out)["trials"]]
    assert outcomes == ["completed", "completed", "interrupted"]
    assert run(["export", str(results)]) == 0
