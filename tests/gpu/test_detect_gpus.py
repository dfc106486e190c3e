"""Detection describes the GPUs that torch sees."""

import pytest
import torch

from launchers.machine.detect import detect_cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_machine_with_gpus_is_described_as_a_cluster_of_them() -> None:
    cluster = detect_cluster()
    assert cluster.device == "cuda"
    assert cluster.world_size == torch.cuda.device_count()
    assert cluster.gpu.name == torch.cuda.get_device_name(0)
    smallest = min(torch.cuda.get_device_properties(n).total_memory for n in range(cluster.world_size))
    assert cluster.gpu.memory_gib == pytest.approx(smallest / 1024**3, abs=0.06)
    assert cluster.nvlink_bandwidth_gb_per_s > 0
