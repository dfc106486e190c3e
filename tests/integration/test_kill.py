"""A sweep that is killed at random moments, or stopped, resumes as if it never was, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launchers.processes import marked_processes
from tests.kills import kill_and_resume
from tuner.files import read_json
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialResult

SWEEP = """
name: night
workload: {model: tiny-gpt, seq_length: 64, global_batch_size: 4, precision: fp32}
cluster: {name: cpu-4, gpus_per_node: 2}
knobs: {tp: [1, 2], micro_batch_size: [1, 2]}
measurement: {min_steps: 500, max_steps: 500}
"""


def test_a_sweep_killed_at_random_moments_ends_with_the_table_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    tally = kill_and_resume(tmp_path, kills=4, seed=1, trials=9)
    assert tally.kills == 4
    assert tally.differing == []
    assert (tally.lost, tally.twice, tally.orphans) == (0, 0, 0)
    assert tally.trials == 9 * tally.sweeps


def test_a_sweep_killed_with_two_trials_in_flight_loses_none_and_runs_none_twice(tmp_path: Path) -> None:
    tally = kill_and_resume(tmp_path, kills=3, seed=2, trials=9, slots=2)
    assert tally.kills == 3
    assert (tally.lost, tally.twice, tally.orphans) == (0, 0, 0)
    assert tally.trials == 9 * tally.sweeps


def test_sigterm_to_the_tuner_alone_ends_its_trial_and_says_how_to_resume(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    folder = SweepFolder(tmp_path / "results" / "night")
    tuner = subprocess.Popen(
        [sys.executable, "-c", "from tuner.cli import main; main()", "sweep", "sweep.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 120
    while not folder.trial(0).heartbeat.exists():
        assert tuner.poll() is None and time.monotonic() < deadline_s, "the first trial never began"
        time.sleep(0.1)
    tuner.send_signal(signal.SIGTERM)
    out, err = tuner.communicate(timeout=60)
    assert tuner.returncode == 130, err
    assert "SIGTERM: ending the running trial; everything measured is kept" in err
    assert "Traceback" not in err
    assert "megatune sweep sweep.yaml" in out + err
    assert read_json(TrialResult, folder.trial(0).result).outcome is Outcome.INTERRUPTED
    assert marked_processes(str(tmp_path)) == []
