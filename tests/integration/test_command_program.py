"""A trainer that knows nothing of megatune is tuned through its command line and its log."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launchers.local.torchrun import TorchrunLauncher
from tests.trials import CLUSTER, spec_of
from tuner.cli.app import run as app_run
from tuner.core.layout import Layout
from tuner.trial.contract import Measurement, Outcome, TrialFolder, TrialResult
from tuner.trial.program import Command

TRAINER = Path(__file__).parent / "programs" / "trainer.py"
COMMAND = Command(
    command=(
        *(
            sys.executable,
            str(TRAINER),
            "--train-iters",
            "{steps}",
            "--micro-batch-size",
            "{micro_batch_size}",
        ),
        *("--tensor-model-parallel-size", "{tp}"),
    ),
    log="megatron-lm",
)
CPU = replace(CLUSTER, device="cpu", gpus_per_node=4, nvlink_domain_gpus=4)


def run(
    folder: Path, layout: Layout, command: Command = COMMAND, give_up_above_ms: float | None = None
) -> TrialResult:
    measurement = Measurement(warmup_steps=3, min_steps=3, max_steps=20)
    spec = replace(
        spec_of(0, layout, cluster=CPU),
        program=command,
        measurement=measurement,
        give_up_above_ms=give_up_above_ms,
    )
    launcher = TorchrunLauncher()
    return launcher.run(launcher.plan(spec, TrialFolder(folder)), threading.Event())


def test_the_figures_in_the_log_are_the_measurement(tmp_path: Path) -> None:
    result = run(tmp_path, Layout(micro_batch_size=2))
    assert result.outcome is Outcome.COMPLETED, result.reason
    assert result.metrics is not None
    assert (result.metrics.step_time_ms, len(result.metrics.step_times_ms)) == (20.0, 20)
    assert result.metrics.losses[:2] == (10.0, 5.0)
    assert result.metrics.peak_allocated_gib == pytest.approx(2e9 / 2**30)


@pytest.mark.parametrize(
    ("layout", "outcome", "reason"),
    [
        (Layout(micro_batch_size=8), Outcome.OOM, "CUDA out of memory"),
        (Layout(tp=4), Outcome.INVALID, "no tensor parallelism of 4"),
    ],
)
def test_a_failure_is_recognised_by_its_text(
    layout: Layout, outcome: Outcome, reason: str, tmp_path: Path
) -> None:
    result = run(tmp_path, layout)
    assert (result.outcome, reason in result.reason) == (outcome, True), result.reason


def test_a_sweep_tunes_the_trainer_and_names_the_best_micro_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    model = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    model |= {"num_query_groups": 2, "kv_channels": 16, "vocab_size": 256}
    sweep = {
        "name": "trainer",
        "workload": {
            "model": {"name": "mine", **model},
            "seq_length": 128,
            "global_batch_size": 16,
            "precision": "fp32",
        },
        "cluster": "cpu-4",
        "knobs": {"micro_batch_size": [1, 2, 4]},
        "budget": {"trials": 3, "finalists": 0},
        "measurement": {"min_steps": 3, "max_steps": 5},
        "program": {"command": list(COMMAND.command), "log": "megatron-lm"},
    }
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    assert app_run(["sweep", str(file), "--results", str(tmp_path)]) == 0
    assert "tp1 pp1 mbs4" in (tmp_path / "trainer" / "summary.md").read_text()
    assert "++train.micro_batch_size=4" in capsys.readouterr().out


def test_a_trial_that_cannot_beat_the_best_ends_early_with_a_bound(tmp_path: Path) -> None:
    result = run(tmp_path, Layout(), give_up_above_ms=5.0)
    assert result.outcome is Outcome.TOO_SLOW, result.reason
    assert result.slower_than_ms == 40.0


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Command(command=("echo", "done")), "wrote no result.json"),
        (Command(command=("echo", "done"), log="megatron-lm"), "states 0 step times and no peak memory"),
        (Command(command=("no-such-trainer",)), "no-such-trainer"),
        (
            Command(command=(sys.executable, "-c", "import os; os.kill(os.getpid(), 11)")),
            "died in startup of SIGSEGV",
        ),
    ],
)
def test_a_command_whose_output_lacks_figures_is_an_infrastructure_failure(
    command: Command, reason: str, tmp_path: Path
) -> None:
    result = run(tmp_path, Layout(), command)
    assert result.outcome is Outcome.INFRASTRUCTURE
    assert reason in result.reason
