"""The devices of a machine are described as a cluster."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.machine import detect
from launchers.machine.detect import Device, as_installed, cpu_cluster, gpu_cluster
from search_spaces.loader import load_cluster
from tuner.errors import InputError

GIB = 1024**3
LEAST_MEMORY_GIB = load_cluster("cpu-4").gpu.memory_gib


def device(name: str = "NVIDIA H100 80GB HBM3", memory_gib: float = 79.1, has_nvlink: bool = True) -> Device:
    return Device(name=name, memory_gib=memory_gib, has_nvlink=has_nvlink, pcie_gb_per_s=63.0)


def test_known_gpus_take_their_peaks_from_the_built_in_cluster_and_their_number_from_the_machine() -> None:
    cluster, built_in = gpu_cluster([device()] * 2), load_cluster("dgx-h100")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.nvlink_domain_gpus) == (1, 2, 2)
    assert cluster.device == "cuda"
    assert cluster.gpu.peak_tflops == built_in.gpu.peak_tflops
    assert cluster.nvlink_bandwidth_gb_per_s == built_in.nvlink_bandwidth_gb_per_s


def test_the_smallest_gpu_gives_the_memory() -> None:
    assert gpu_cluster([device(memory_gib=79.1), device(memory_gib=78.5)]).gpu.memory_gib == 78.5


def test_gpus_without_nvlink_are_connected_by_pcie() -> None:
    assert gpu_cluster([device(has_nvlink=False)] * 2).nvlink_bandwidth_gb_per_s == pytest.approx(50.4)


def test_a_gpu_on_its_own_needs_no_nvlink() -> None:
    assert gpu_cluster([device(has_nvlink=False)]).nvlink_bandwidth_gb_per_s == 450.0


def test_an_unknown_gpu_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        InputError, match=r"'NVIDIA H100 80GB' .*did you mean .*write them into a cluster YAML"
    ):
        gpu_cluster([device("NVIDIA H100 80GB")])


def test_a_mix_of_gpus_is_refused() -> None:
    with pytest.raises(InputError, match=r"several models .*CUDA_VISIBLE_DEVICES"):
        gpu_cluster([device(), device("NVIDIA H200")])


@settings(max_examples=25)
@given(st.integers(1, 256), st.integers(2 * GIB, 4096 * GIB))
def test_cpu_ranks_are_few_and_share_at_most_half_of_the_memory_or_the_least_that_trains(
    cores: int, memory_bytes: int
) -> None:
    cluster = cpu_cluster(cores, memory_bytes)
    assert cluster.device == "cpu"
    assert 2 <= cluster.world_size <= 8
    assert cluster.world_size <= max(cores, 2)
    share = memory_bytes / 2 / GIB / cluster.world_size
    assert cluster.gpu.memory_gib == pytest.approx(max(share, LEAST_MEMORY_GIB), abs=0.005)


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_cluster_whose_trials_can_run_here_says_whether_transformer_engine_is_installed(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "_has_gpus", lambda: True)
    monkeypatch.setattr(detect, "find_spec", lambda name: object() if is_installed else None)
    assert as_installed(load_cluster("dgx-h100")).transformer_engine is is_installed


@pytest.mark.parametrize("stated", [True, False])
def test_on_a_machine_without_gpus_the_clusters_own_word_counts(
    stated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "_has_gpus", lambda: False)
    cluster = replace(load_cluster("dgx-h100"), transformer_engine=stated)
    assert as_installed(cluster) == cluster
