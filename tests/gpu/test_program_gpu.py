"""The program of a trial trains a dense model and a mixture of experts on one real GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.processes import python_path
from tests.trials import CLUSTER, MODEL
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.files import read_json, write_json
from tuner.trial.contract import Outcome, TrialFolder, TrialResult, TrialSpec

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).parents[2]
DENSE = replace(
    MODEL, name="dense", hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8, kv_channels=64
)
MOE = replace(
    DENSE,
    name="moe",
    num_moe_experts=8,
    moe_ffn_hidden_size=512,
    moe_router_topk=2,
    moe_shared_expert_intermediate_size=512,
)
RECOMPUTED = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def run(model: Model, layout: Layout, path: Path) -> TrialResult:
    folder = TrialFolder(path)
    workload = Workload(model=model, seq_length=512, global_batch_size=8, precision="bf16")
    cluster = replace(CLUSTER, gpus_per_node=1, nvlink_domain_gpus=1)
    write_json(
        folder.spec, TrialSpec(sweep="gpu", number=0, workload=workload, cluster=cluster, layout=layout)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, "-m", "launchers.programs.megatron_core", folder.spec, path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(python_path())},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert folder.result.exists(), done.stderr[-4000:]
    result = read_json(TrialResult, folder.result)
    assert result.outcome is Outcome.COMPLETED, json.dumps([result.reason, done.stderr[-4000:]])
    return result


@pytest.mark.parametrize("model", [DENSE, MOE], ids=lambda model: model.name)
def test_one_gpu_trains_in_bf16(model: Model, tmp_path: Path) -> None:
    result = run(model, Layout(micro_batch_size=2), tmp_path)
    assert result.metrics is not None
    assert result.metrics.mfu is not None
    assert 0 < result.metrics.mfu < 1
    assert result.metrics.peak_reserved_gib is not None
    assert 0 < result.metrics.peak_allocated_gib <= result.metrics.peak_reserved_gib
    assert {"cuda", "driver", "nccl"} <= result.versions.keys()


def test_recomputing_layers_takes_less_memory_on_a_gpu(tmp_path: Path) -> None:
    peaks = []
    for name, layout in (("kept", Layout()), ("recomputed", RECOMPUTED)):
        (tmp_path / name).mkdir()
        metrics = run(DENSE, replace(layout, micro_batch_size=8), tmp_path / name).metrics
        assert metrics is not None
        peaks.append(metrics.peak_allocated_gib)
    assert peaks[1] < peaks[0]
