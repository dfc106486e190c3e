"""The shipped clusters can be loaded, and each of their figures has a source."""

from pathlib import Path

import pytest

from search_spaces.loader import cluster_names, load_cluster
from tuner.errors import InputError

FIGURES = {
    "gpu.memory_gib",
    "gpu.peak_tflops",
    "gpu.memory_bandwidth_gb_per_s",
    "nvlink_bandwidth_gb_per_s",
    "nvlink_latency_us",
    "fabric_bandwidth_gb_per_s",
    "fabric_latency_us",
}


@pytest.mark.parametrize("name", cluster_names())
def test_a_built_in_cluster_is_named_after_its_file_and_states_a_source_for_every_figure(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert set(cluster.sources) == FIGURES


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        # Published with sparsity: H100, H200 and NVL72 data sheets, Blackwell architecture brief.
        ("dgx-h100", 1979, 3958),
        ("dgx-h200", 1979, 3958),
        ("dgx-b200", 4500, 9000),
        ("gb200-nvl72", 5000, 10000),
        ("gb300-nvl72", 5000, 10000),
    ],
)
def test_peaks_are_dense_and_half_of_the_sparse_peaks_on_the_data_sheet(
    name: str, bf16: float, fp8: float
) -> None:
    peaks = load_cluster(name).gpu.peak_tflops
    assert peaks["bf16"] == pytest.approx(bf16 / 2, rel=0.001)
    assert peaks["fp8"] == pytest.approx(fp8 / 2, rel=0.001)


def test_a_precision_that_the_gpu_lacks_has_no_peak() -> None:
    assert "fp8" not in load_cluster("dgx-a100-80").gpu.peak_tflops
    assert "nvfp4" not in load_cluster("dgx-h100").gpu.peak_tflops


def test_an_nvl72_is_one_nvlink_domain_over_its_trays() -> None:
    rack = load_cluster("gb200-nvl72")
    assert (rack.world_size, rack.gpus_per_node, rack.nvlink_domain_gpus) == (72, 4, 72)


def test_the_number_of_nodes_can_be_chosen() -> None:
    assert load_cluster("dgx-h100", nodes=4).world_size == 32
    with pytest.raises(InputError, match="nodes must be at least 1, not 0"):
        load_cluster("dgx-h100", nodes=0)


def test_an_unknown_cluster_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown cluster 'dgx-h10' \(did you mean 'dgx-h100'\?\)"):
        load_cluster("dgx-h10")
    with pytest.raises(InputError, match="cannot be read"):
        load_cluster(str(tmp_path / "none.yaml"))
