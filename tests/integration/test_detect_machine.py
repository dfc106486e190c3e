"""Detection describes the machine that it runs on."""

import os

import psutil
import pytest
import torch

from launchers.machine.detect import detect_cluster


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: tests/gpu covers it")
def test_a_machine_without_gpu_is_a_cluster_of_cpu_ranks_that_fits_its_memory() -> None:
    cluster = detect_cluster()
    assert cluster.device == "cpu"
    assert cluster.nodes == 1
    assert cluster.world_size == min(max(len(os.sched_getaffinity(0)), 2), 8)
    assert cluster.world_size * cluster.gpu.memory_gib <= psutil.virtual_memory().total / 1024**3
    assert cluster.gpu.peak_tflops.keys() == {"fp32"}
