"""What the tests of the commands share: a sweep file, a command that must be refused, and results without a search."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.replay import ReplayLauncher, claim
from tests.trials import spec_of
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.files import write_json
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import SweepFolder
from tuner.trial.finished import TrialSource

SWEEP: Mapping[str, Any] = {
    "name": "night",
    "workload": {"model": "tiny-gpt", "seq_length": 128, "global_batch_size": 8, "precision": "fp32"},
    "cluster": {"name": "cpu-4", "gpus_per_node": 2},
    "knobs": {"tp": [1, 2], "pp": [1, 2], "micro_batch_size": [1, 2]},
    "budget": {"trials": 3},
}
"""A sweep of two CPU ranks with 16 combinations of its knobs."""


def write(path: Path, data: Any) -> str:
    """Write a text as it is, or data as YAML; returns the path for a command line."""
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(dict(data), sort_keys=False))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must end with `code` and one message; returns the message with single spaces."""
    assert run(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "internal error" not in err
    return " ".join(err.split())


def write_results(
    results: Path, sweep: Sweep, layouts: Sequence[Layout], launcher: ReplayLauncher | None = None
) -> None:
    """Fill a results folder with a replayed trial per layout, the first one as the baseline, without any search."""
    launcher, folder = launcher or ReplayLauncher(), SweepFolder(results)
    claim(folder, sweep)
    for number, layout in enumerate(layouts):
        trial = folder.trial(number)
        trial.path.mkdir(parents=True)
        write_json(trial.source, TrialSource(source="sampler" if number else "baseline"))
        launcher.run(launcher.plan(spec_of(number, layout), trial), threading.Event())
