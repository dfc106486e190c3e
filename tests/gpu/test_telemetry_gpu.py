"""NVML reports the state of the real GPUs."""

import time
from pathlib import Path

import pytest
import torch

from launchers.watch.gpus import GpuSelection
from launchers.watch.ownership import OwnProcesses
from launchers.watch.sampling import Sampler
from launchers.watch.telemetry import summarise
from tuner.trial.contract import TrialFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_at_work_reports_its_clock_its_power_and_no_foreign_process(tmp_path: Path) -> None:
    assert OwnProcesses(tmp_path).holds(0) is False
    sampler = Sampler(TrialFolder(tmp_path), GpuSelection(1), 60.0, lambda: "measure")
    sampler.start()
    matrix = torch.randn(4096, 4096, device="cuda")
    end_s = time.monotonic() + 2.0
    while time.monotonic() < end_s:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        torch.cuda.synchronize()
    telemetry = summarise(sampler.end(), 1000.0)
    assert telemetry is not None
    assert telemetry.samples >= 5
    assert telemetry.power_w is not None and telemetry.power_w > 20
    assert telemetry.energy_j_per_token == pytest.approx(telemetry.power_w / 1000)
    assert telemetry.clock_mhz is not None and telemetry.clock_mhz > 100
    assert telemetry.temperature_c is not None and 10 < telemetry.temperature_c < 110
    assert telemetry.foreign_memory_gib in (None, 0.0), "None where a container hides who is who"
