"""The place and the results that the tests of the commands start from."""

from pathlib import Path

import pytest

from tests.replay import ReplayLauncher, sweep_of
from tests.unit.cli.commands import SWEEP, write, write_results
from tuner.core.layout import Layout
from tuner.trial.contract import Outcome


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in an empty folder and know no MLflow server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
    return write(tmp_path / "sweep.yaml", SWEEP)


@pytest.fixture(scope="session")
def measured(in_memory: Path) -> Path:
    """Results of the test model: a stated baseline, two trials out of memory, an invalid one, four more measured."""
    results = in_memory / "measured"
    layouts = [
        Layout(tp=4, pp=2),
        Layout(micro_batch_size=2),
        Layout(tp=2, micro_batch_size=4),
        Layout(tp=4),
        Layout(tp=2, micro_batch_size=2),
        Layout(tp=2, pp=2, micro_batch_size=4),
        Layout(pp=2),
        Layout(tp=4, micro_batch_size=4),
    ]
    launcher = ReplayLauncher(limit_gib=60.0, script={3: [Outcome.INVALID]})
    write_results(results, sweep_of(baseline={"tp": 4, "pp": 2}, recipe="mine"), layouts, launcher)
    return results
