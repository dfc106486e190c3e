"""A trial measures alike whether its ranks are forked or started cold."""

import threading
from pathlib import Path

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from tests.trials import gloo_trial
from tuner.trial.contract import Metrics, TrialFolder, TrialResult

SPEC = gloo_trial(steps=3)


def run(launcher: TorchrunLauncher, folder: Path) -> TrialResult:
    return launcher.run(launcher.plan(SPEC, TrialFolder(folder)), threading.Event())


def measured(result: TrialResult) -> Metrics:
    assert result.metrics is not None, result.reason
    return result.metrics


def test_forked_and_cold_trials_measure_alike(tmp_path: Path) -> None:
    cold = run(TorchrunLauncher(), tmp_path / "cold")
    with Preload(tmp_path) as preload:
        forked = [run(TorchrunLauncher(start=preload.start), tmp_path / f"forked{n}") for n in range(2)]
    for again in forked:
        assert measured(again).losses == measured(cold).losses
        assert measured(again).grad_norms == measured(cold).grad_norms
        assert measured(again).peak_allocated_gib == measured(cold).peak_allocated_gib
        assert len(measured(again).step_times_ms) == len(measured(cold).step_times_ms)
        assert again.versions == cold.versions
        assert [(rank.rank, rank.phase, rank.step) for rank in again.ranks] == [
            (rank.rank, rank.phase, rank.step) for rank in cold.ranks
        ]
