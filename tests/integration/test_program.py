"""The program of a trial, run by torchrun: every way it ends leaves its record in the folder.

Run as a script (by torchrun), this file is the same program with weights that are not numbers.
"""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.local.torchrun import TorchrunLauncher
from launchers.programs.harness.measure import median_interval
from tests.trials import CLUSTER, MODEL
from tuner.core.flops import model_flops_per_token
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.files import read_json, write_json
from tuner.trial.contract import (
    Heartbeat,
    Measurement,
    Outcome,
    RankRecord,
    TrialFolder,
    TrialResult,
    TrialSpec,
)

ROOT = Path(__file__).parents[2]
WORKLOAD = Workload(model=MODEL, seq_length=64, global_batch_size=8, precision="fp32")
PROGRAM = ("-m", "launchers.programs.megatron_core")
GIB = 1024**3


def spec_of(layout: Layout, ranks: int, memory_gib: float = 1.0, workload: Workload = WORKLOAD) -> TrialSpec:
    gpu = replace(CLUSTER.gpu, name="cpu", memory_gib=memory_gib, peak_tflops={"fp32": 0.1})
    cluster = replace(
        CLUSTER, name="here", device="cpu", gpu=gpu, gpus_per_node=ranks, nvlink_domain_gpus=ranks
    )
    measurement = Measurement(warmup_steps=3, min_steps=2, max_steps=4)
    return TrialSpec(
        sweep="test", number=0, workload=workload, cluster=cluster, layout=layout, measurement=measurement
    )


def run(
    spec: TrialSpec, path: Path, ranks: int | None = None, program: tuple[str, ...] = PROGRAM
) -> TrialResult:
    folder = TrialFolder(path)
    write_json(folder.spec, spec)
    number = str(ranks or spec.cluster.world_size)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            number,
            *program,
            folder.spec,
            path,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert folder.result.exists(), done.stderr[-4000:]
    result = read_json(TrialResult, folder.result)
    assert (done.returncode == 0) is (result.outcome is Outcome.COMPLETED), done.stderr[-4000:]
    return result


def test_a_trial_that_runs_to_its_end_reports_its_measurement(tmp_path: Path) -> None:
    spec = spec_of(Layout(pp=2, micro_batch_size=2), ranks=2)
    result = run(spec, tmp_path)
    assert result.outcome is Outcome.COMPLETED
    metrics = result.metrics
    assert metrics is not None
    assert 2 <= len(metrics.step_times_ms) <= 4
    steps = len(metrics.warmup_times_ms) + len(metrics.step_times_ms)
    assert len(metrics.losses) == len(metrics.grad_norms) == steps
    assert 3 <= len(metrics.warmup_times_ms) <= 5
    interval = (metrics.step_time_ms, metrics.step_time_low_ms, metrics.step_time_high_ms)
    assert interval == median_interval(metrics.step_times_ms)
    tokens = 8 * 64 / (metrics.step_time_ms / 1000) / 2
    assert metrics.tokens_per_s_per_gpu == pytest.approx(tokens)
    tflops = tokens * model_flops_per_token(WORKLOAD) / 1e12
    assert metrics.model_tflops_per_s_per_gpu == pytest.approx(tflops)
    assert metrics.mfu == pytest.approx(tflops / 0.1)
    assert [(record.rank, record.step, record.failure) for record in result.ranks] == [
        (0, len(metrics.losses), None),
        (1, len(metrics.losses), None),
    ]
    assert metrics.peak_allocated_gib == max(record.peak_allocated_gib or 0 for record in result.ranks)
    durations = result.durations
    parts = durations.startup_s + durations.build_s + durations.warmup_s + durations.measure_s
    assert sum(metrics.step_times_ms) / 1000 < durations.measure_s < parts <= durations.total_s
    assert {"torch", "megatron-core", "python"} <= result.versions.keys()
    heartbeat = read_json(Heartbeat, TrialFolder(tmp_path).heartbeat)
    assert (heartbeat.phase, heartbeat.step) == ("teardown", len(metrics.losses))


def test_a_trial_that_is_slower_than_asked_for_ends_early_with_a_bound(tmp_path: Path) -> None:
    measurement = Measurement(warmup_steps=3, min_steps=30, max_steps=30)
    spec = replace(
        spec_of(Layout(pp=2, micro_batch_size=2), ranks=2), measurement=measurement, give_up_above_ms=0.5
    )
    launcher = TorchrunLauncher()
    result = launcher.run(launcher.plan(spec, TrialFolder(tmp_path)), threading.Event())
    assert (result.outcome, result.phase, result.metrics) == (Outcome.TOO_SLOW, "measure", None), (
        result.reason
    )
    assert [record.failure for record in result.ranks] == [None, None]
    steps = {record.step for record in result.ranks}
    assert len(steps) == 1, "every rank ends after the same step"
    timed = steps.pop() - 3
    assert 3 <= timed < 30
    assert all(record.peak_allocated_gib for record in result.ranks)
    bound_ms = result.slower_than_ms
    assert bound_ms is not None
    assert 0.5 < bound_ms < 1000 * result.durations.measure_s / timed
    assert f"slower than {bound_ms:.1f} ms" in result.reason
    assert "given up above 0.5 ms" in result.reason
    assert result.durations.warmup_s > 0


def test_a_rank_that_does_not_fit_makes_the_trial_out_of_memory(tmp_path: Path) -> None:
    # The last stage has three of four layers, so only it does not fit.
    layout = Layout(pp=2, num_layers_in_first_pipeline_stage=1)
    fits = run(spec_of(layout, ranks=2), tmp_path)
    peaks = [record.peak_allocated_gib or 0.0 for record in fits.ranks]
    assert peaks[0] < peaks[1]
    (tmp_path / "small").mkdir()
    result = run(spec_of(layout, ranks=2, memory_gib=(peaks[0] + peaks[1]) / 2), tmp_path / "small")
    assert (result.outcome, result.rank) == (Outcome.OOM, 1)
    assert "Tried to allocate" in result.reason
    record = read_json(RankRecord, TrialFolder(tmp_path / "small").rank_record(1))
    assert record.failure is not None
    assert record.failure.kind == "torch.OutOfMemoryError"
    assert record.phase in {"forward", "backward", "optimizer"}


def test_weights_that_do_not_fit_end_the_trial_while_it_builds(tmp_path: Path) -> None:
    fits = 4 * 2 * 64 * 64 / GIB  # two of the smallest matrices
    result = run(spec_of(Layout(), ranks=1, memory_gib=fits), tmp_path)
    assert (result.outcome, result.phase) == (Outcome.OOM, "build")


def test_a_layout_that_megatron_refuses_is_invalid_in_megatrons_words(tmp_path: Path) -> None:
    result = run(spec_of(Layout(sp=True), ranks=1), tmp_path)
    assert (result.outcome, result.phase) == (Outcome.INVALID, "build")
    assert "Cannot use sequence parallelism without tensor parallelism" in result.reason


def test_a_number_of_ranks_other_than_the_clusters_is_refused(tmp_path: Path) -> None:
    result = run(spec_of(Layout(), ranks=2), tmp_path, ranks=1)
    assert result.outcome is Outcome.INVALID
    assert "1 ranks were started for a cluster of 1 * 2 = 2 GPUs" in result.reason


def test_a_loss_that_is_nan_ends_the_trial(tmp_path: Path) -> None:
    result = run(spec_of(Layout(), ranks=2), tmp_path, program=(__file__,))
    assert result.outcome is Outcome.NAN
    assert [record.step for record in result.ranks] == [1] * len(result.ranks)


def _with_weights_that_are_no_numbers() -> int:
    from torch import nan

    from launchers.programs.megatron_core import __main__ as program
    from launchers.programs.megatron_core import train

    def fill(chunks: list[Any], seed: int) -> None:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(nan)

    job_module: Any = train
    job_module.initialize_weights = fill
    return program.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_with_weights_that_are_no_numbers())
