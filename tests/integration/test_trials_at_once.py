"""Two real trials run at once through one launcher, and neither disturbs the other."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.processes import marked_processes
from search_spaces.loader import load_cluster
from tests import kills
from tests.faults import LIMITS, Programs, spec_for
from tests.integration.test_forked_and_cold import SPEC
from tuner.files import parse, read_json
from tuner.search.grid import grid_space
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import SweepFile
from tuner.sweep.controller import resumed
from tuner.sweep.folder import SweepFolder
from tuner.sweep.resolution import resolve
from tuner.sweep.restore import restored
from tuner.sweep.runner import ThreadRunner
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.state import RunningTrial
from tuner.trial.contract import Heartbeat, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.launcher import Place

COLD = TorchrunLauncher(programs=Programs(), grace_s=1.0)


@pytest.fixture(params=["cold", "forked"])
def launcher(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TorchrunLauncher]:
    """One launcher for both trials; after the test, no process of a trial may run."""
    # pytest changes it during the test, and with it the environment of the jobs.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with Preload(tmp_path) if request.param == "forked" else nullcontext() as preload:
        yield COLD if preload is None else replace(COLD, start=preload.start)
        assert preload is None or preload.jobs() == []
    assert marked_processes(str(tmp_path)) == []


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Two threads, each of which runs one trial at a time."""
    with ThreadPoolExecutor(max_workers=2) as executor:
        yield executor


class Started:
    """A trial that runs in a thread."""

    def __init__(
        self, threads: ThreadPoolExecutor, launcher: TorchrunLauncher, spec: TrialSpec, path: Path
    ) -> None:
        self.folder, self.stop, self.begun = TrialFolder(path), threading.Event(), threading.Event()
        plan = launcher.plan(spec, self.folder)
        self.run: Future[TrialResult] = threads.submit(launcher.run, plan, self.stop, self._hear)

    def _hear(self, heartbeat: Heartbeat) -> None:
        self.begun.set()

    def result(self) -> TrialResult:
        result = self.run.result()
        assert read_json(TrialResult, self.folder.result) == result
        return result


def test_both_complete(launcher: TorchrunLauncher, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    spec = spec_for("meets_another", LIMITS)
    trials = [Started(threads, launcher, spec, tmp_path / name) for name in ("t0", "t1")]
    for trial in trials:
        assert (trial.result().outcome, trial.result().reason) == (Outcome.COMPLETED, "measured")


@pytest.mark.parametrize("stopped_first", [True, False])
def test_one_is_stopped_and_the_other_completes(
    stopped_first: bool, launcher: TorchrunLauncher, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    programs = ("hangs", "outlives_another") if stopped_first else ("outlives_another", "hangs")
    trials = {name: Started(threads, launcher, spec_for(name), tmp_path / name) for name in programs}
    for trial in trials.values():
        assert trial.begun.wait(LIMITS.startup_s)
    trials["hangs"].stop.set()
    assert trials["hangs"].result().outcome is Outcome.INTERRUPTED
    other = trials["outlives_another"].result()
    assert (other.outcome, other.reason) == (Outcome.COMPLETED, "measured")


@pytest.mark.parametrize("launcher", ["forked"], indirect=True)
def test_a_third_trial_is_forked_from_a_server_that_exists(
    launcher: TorchrunLauncher, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    spec = spec_for("meets_another", LIMITS)
    for trial in [Started(threads, launcher, spec, tmp_path / name) for name in ("t0", "t1")]:
        assert trial.result().outcome is Outcome.COMPLETED
    servers = marked_processes(str(tmp_path))
    assert len(servers) == 2
    third = Started(threads, launcher, spec_for("completes", LIMITS), tmp_path / "t2")
    assert third.result().outcome is Outcome.COMPLETED
    assert marked_processes(str(tmp_path)) == servers


@pytest.mark.parametrize("launcher", ["forked"], indirect=True)
def test_a_trial_with_another_environment_leaves_no_more_servers_than_trials_ran_at_once(
    launcher: TorchrunLauncher,
    threads: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(3):
        monkeypatch.setenv("CHANGED", str(number))
        trial = Started(threads, launcher, spec_for("completes", LIMITS), tmp_path / f"t{number}")
        assert trial.result().outcome is Outcome.COMPLETED
        assert len(marked_processes(str(tmp_path))) == 1


def test_both_train_a_model_and_reach_equal_losses(
    launcher: TorchrunLauncher, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    launcher = replace(launcher, programs=TorchrunLauncher().programs)
    trials = [Started(threads, launcher, SPEC, tmp_path / name) for name in ("t0", "t1")]
    measured = [trial.result().metrics for trial in trials]
    assert None not in measured, [trial.result().reason for trial in trials]
    assert len({(metrics.losses, metrics.grad_norms) for metrics in measured if metrics}) == 1


def test_a_sweep_with_two_trials_in_flight_is_stopped_and_leaves_no_process(tmp_path: Path) -> None:
    stop, folder = threading.Event(), SweepFolder(tmp_path / "night")
    keys = {**kills.SWEEP, "budget": {"trials": 9, "min_gain": None, "finalists": 0}}
    sweep = resolve(parse(SweepFile, keys, "night"), "night", Path(), lambda: load_cluster("cpu-4"))
    sweep = replace(sweep, program="beats_forever")

    class StopOnceTwoRun(Sink):
        def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
            if len(snapshot.state.running) == 2:
                threading.Timer(1.0, stop.set).start()

    with folder.claimed(sweep), Preload(folder.path) as preload:
        launcher = TorchrunLauncher(programs=Programs(), start=preload.start, cores=4096)
        with ThreadRunner(launcher, stop, (Place(), Place())) as runner:
            controller = resumed(
                sweep,
                table=grid_space(sweep.problem).table,
                queue=(),
                folder=folder,
                runner=runner,
                stop=stop,
                sinks=[StopOnceTwoRun()],
            )
            assert controller.run() is Stop.INTERRUPTED
    results = [read_json(TrialResult, folder.trial(number).result).outcome for number in (0, 1)]
    assert results == [Outcome.INTERRUPTED, Outcome.INTERRUPTED]
    assert marked_processes(str(tmp_path.absolute())) == []
    state = restored(folder, sweep)
    assert ([trial.number for trial in state.waiting], state.ended) == ([0, 1], ())
