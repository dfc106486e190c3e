"""`megatune sweep` trains on two CPU ranks, from the command to the override, and through an interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from launchers.processes import marked_processes
from tuner.files import read_json
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialResult
from tuner.trial.finished import read_trials

SWEEP = """
name: {name}
workload: {{model: tiny-gpt, seq_length: 64, global_batch_size: 4, precision: fp32}}
cluster: {{name: cpu-4, gpus_per_node: 2{memory}}}
knobs: {{tp: [1, 2], pp: [1, 2], micro_batch_size: [1, 2]}}
budget: {{trials: {trials}, min_gain: null{budget}}}
measurement: {{min_steps: 20, max_steps: 20}}
"""


def _megatune(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [sys.executable, "-c", "from tuner.cli import main; main()", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = _megatune(folder, *arguments)
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def _write(folder: Path, name: str, trials: int, memory: str = "", budget: str = "") -> str:
    text = SWEEP.format(name=name, trials=trials, memory=memory, budget=budget)
    (folder / "sweep.yaml").write_text(text)
    return "sweep.yaml"


def _wait_for(condition: Path, process: subprocess.Popen[str], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition.exists():
        assert process.poll() is None, "the sweep ended early"
        assert time.monotonic() < deadline_s, f"{condition} never came"
        time.sleep(0.1)


def test_a_sweep_is_interrupted_goes_on_and_ends_with_an_override(tmp_path: Path) -> None:
    sweep_file = _write(tmp_path, "night", trials=3)
    folder = SweepFolder(tmp_path / "results" / "night")
    process = _megatune(tmp_path, "sweep", sweep_file)
    _wait_for(folder.trial(0).spec, process, timeout_s=90)
    code, _, err = _run(tmp_path, "sweep", sweep_file)
    assert (code, "another megatune is running this sweep" in err) == (2, True)
    _wait_for(folder.trial(1).heartbeat, process, timeout_s=90)
    first = folder.trial(0).result.read_bytes()

    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "everything measured is kept" in err
    assert "go on with:\n    megatune sweep sweep.yaml\n" in out
    assert "Traceback" not in err
    assert marked_processes(str(tmp_path)) == []
    assert read_json(TrialResult, folder.trial(1).result).outcome is Outcome.INTERRUPTED

    code, out, err = _run(tmp_path, "sweep", sweep_file)
    assert code == 0, err
    assert "1 trials done" in err
    assert folder.trial(0).result.read_bytes() == first, "a measured trial is never measured again"
    assert marked_processes(str(tmp_path)) == []
    _check_results(tmp_path, folder, out)


def _check_results(cwd: Path, folder: SweepFolder, out: str) -> None:
    rows = read_trials(folder.path)
    assert [row.number for row in rows] == [0, 1, 2]
    assert {row.result.outcome for row in rows} <= {Outcome.COMPLETED, Outcome.TOO_SLOW}
    measured = [row for row in rows if row.result.metrics]
    assert len({row.layout for row in rows}) == 3
    for row in rows:
        trial = folder.trial(row.number)
        assert all(path.exists() for path in (trial.spec, trial.plan, trial.source, trial.log))
    assert {"sweep.json", "study.db", "mlflow.db", "summary.md"} <= {p.name for p in folder.path.iterdir()}
    assert "megatune export results/night" in out

    code, shown, _ = _run(cwd, "show", "night", "--json")
    summary = json.loads(shown)
    fastest = min(measured, key=lambda row: row.result.metrics.step_time_ms if row.result.metrics else 0)
    assert (code, summary["best"], len(summary["trials"])) == (0, fastest.number, 3)
    code, explained, _ = _run(cwd, "explain", "night", "--json")
    explanation = json.loads(explained)
    assert (code, explanation["best"], explanation["peak_memory"]["trials"]) == (
        0,
        fastest.number,
        len(measured),
    )
    assert explanation["peak_memory"]["factor"] == pytest.approx(1, rel=0.1)
    for form in ("bridge-cli", "megatron-lm"):
        code, override, _ = _run(cwd, "export", "night", "--format", form)
        assert code == 0
        assert f"{fastest.layout.micro_batch_size}" in override
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name LIKE 'megatune/%'")
    runs = client.search_runs([experiment.experiment_id])
    statuses = sorted((run.data.tags["megatune.kind"], run.info.status) for run in runs)
    slower = [("trial", "FAILED")] * (3 - len(measured))
    assert statuses == [("sweep", "FINISHED"), *slower, *[("trial", "FINISHED")] * len(measured)]


def test_the_command_lines_limits_hold_and_finals_give_the_answer(tmp_path: Path) -> None:
    budget = ", finalists: 1, final_runs: 2, canary_every: 2"
    sweep_file = _write(tmp_path, "finals", trials=40, budget=budget)
    path = tmp_path / sweep_file
    text = path.read_text().replace("{min_steps: 20, max_steps: 20}", "{min_steps: 5, max_steps: 5}")
    # Without knobs: the default search, a grid and then a refinement.
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("knobs:"))
    # These layouts are slow on CPU, so that others are left for the finals.
    path.write_text(f"{text}baseline: {{tp: 2}}\n")
    code, out, err = _run(tmp_path, "sweep", sweep_file, "--max-trials", "9", "--deadline", "2100-01-01")
    assert code == 0, err
    assert "to end by 2100-01-01 00:00" in err
    rows = read_trials(tmp_path / "results" / "finals")
    sources = [row.source for row in rows]
    assert sources[0] == "baseline"
    assert (sources[3], sources[5:]) == ("canary", ["final"] * 4)
    assert sources[4] in ("seed", "sampler")
    assert [bool(row.around) for row in rows] == [False] * 3 + [True] * 6
    assert f"[{sources[4]}, refinement]" in err
    layouts = [row.layout for row in rows[5:]]
    assert layouts == layouts[::-1]
    assert layouts[1] == rows[0].layout
    summary = " ".join(out.split())
    assert "From t0003 on, the refinement varied the other knobs around the best of the grid: t000" in summary
    assert "Finished: the budget of trials is used." in summary
    assert re.search(
        r"Of (\d+ s|\d\.\d\d h) of trials: \d+% start-up, .* The tuner's own time between this run's", summary
    )
    code, shown, _ = _run(tmp_path, "show", "finals", "--json")
    answer = json.loads(shown)
    assert sorted(len(one["trials"]) for one in answer["finals"]) == [2, 2]
    assert answer["best"] in answer["finals"][0]["trials"]
    code, override, _ = _run(tmp_path, "export", "finals")
    assert (code, "in 2 interleaved runs" in override) == (0, True)
    assert "own time" in (tmp_path / "results" / "finals" / "summary.md").read_text()


def test_nothing_is_feasible_where_every_layout_runs_out_of_memory(tmp_path: Path) -> None:
    sweep_file = _write(tmp_path, "small", trials=3, memory=", memory_gib: 0.001")
    code, _, err = _run(tmp_path, "sweep", sweep_file)
    assert code == 3
    assert "are predicted to need more than 0.001 GiB a GPU" in err
    with (tmp_path / sweep_file).open("a") as file:
        file.write("\nbaseline: {pp: 2}\n")
    code, _, err = _run(tmp_path, "sweep", sweep_file)
    assert code == 3, err
    rows = read_trials(tmp_path / "results" / "small")
    assert [row.result.outcome for row in rows] == [Outcome.OOM]
    assert "1 trials ran, none gave a measured layout" in err
    code, _, err = _run(tmp_path, "export", "small")
    assert code == 3
    assert "no trial completed" in err


@pytest.mark.parametrize("arguments", [["sweep"], ["trial"]])
def test_a_machine_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str]
) -> None:
    text = SWEEP.format(name="big", trials=1, memory="", budget="").replace(
        "gpus_per_node: 2", "gpus_per_node: 4096"
    )
    (tmp_path / "sweep.yaml").write_text(text.replace("global_batch_size: 4", "global_batch_size: 8192"))
    more = ["tp=1"] if arguments == ["trial"] else []
    code, _, err = _run(tmp_path, *arguments, "sweep.yaml", *more)
    assert code == 2
    assert "4096 CPU ranks, but this machine's cores carry" in err
    assert not (tmp_path / "results").exists()
