"""What a results folder holds is what a resumed sweep goes on from; trials of another sweep are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.replay import TRIAL_S, ReplayLauncher, claim, loop_of, run_to_end, sweep_of
from tuner.errors import InputError
from tuner.files import read_json, write_json
from tuner.sweep.folder import SweepFolder
from tuner.sweep.restore import restored
from tuner.trial.contract import Outcome, TrialSpec

SWEEP = sweep_of(budget={"trials": 3})


@pytest.fixture
def night(results: Path) -> SweepFolder:
    run_to_end(results, sweep=SWEEP)
    return SweepFolder(results)


def test_the_state_of_an_ended_sweep_is_its_trials(night: SweepFolder) -> None:
    state = restored(night, SWEEP)
    assert [trial.number for trial in state.ended] == [0, 1, 2]
    assert (state.waiting, state.running, state.next_number) == ((), (), 3)
    assert state.lost_s == 0.0


def test_an_interrupted_trial_waits_and_its_time_is_lost(results: Path) -> None:
    loop_of(results, ReplayLauncher(stop_at=1), SWEEP).run()
    state = restored(SweepFolder(results), SWEEP)
    assert [trial.number for trial in state.ended] == [0]
    (waiting,) = state.waiting
    assert (waiting.number, waiting.attempts_spent) == (1, 0)
    assert state.lost_s == TRIAL_S


def test_an_earlier_attempt_is_lost_time_and_the_trial_is_over(results: Path) -> None:
    run_to_end(results, ReplayLauncher(script={1: [Outcome.HANG]}), SWEEP)
    state = restored(SweepFolder(results), SWEEP)
    assert len(state.ended) == 3
    assert state.lost_s == TRIAL_S


@pytest.mark.parametrize("key", ["workload", "seed", "cluster"])
def test_a_trial_of_another_sweep_is_refused_naming_what_differs(night: SweepFolder, key: str) -> None:
    path = night.trial(1).spec
    spec = read_json(TrialSpec, path)
    foreign = {
        "workload": lambda: replace(spec, workload=replace(spec.workload, seq_length=1024)),
        "seed": lambda: replace(spec, seed=7),
        "cluster": lambda: replace(spec, cluster=replace(spec.cluster, name="another")),
    }
    write_json(path, foreign[key]())
    with pytest.raises(InputError, match=rf"t0001/spec\.json: .*another sweep; different: {key}"):
        restored(night, SWEEP)


def test_a_refused_sweep_leaves_the_folder_of_the_running_one_as_it_is(results: Path) -> None:
    folder = SweepFolder(results)
    with folder.claimed(SWEEP):
        before = folder.identity.read_text()
        with pytest.raises(InputError, match="another megatune"):
            claim(folder, sweep_of(budget={"trials": 99}))
        with pytest.raises(InputError, match="another megatune"):
            claim(folder, sweep_of(seed=7))
        assert folder.identity.read_text() == before
