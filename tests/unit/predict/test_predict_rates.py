"""How fast the ranks are: by the cluster's figures, and by a calibration in their place."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from search_spaces.loader import load_cluster
from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.predict.calibration import Calibration, Collective, Machine, TimeTable
from tuner.predict.time.collectives import process_groups
from tuner.predict.time.rates import MeasuredRates, Rates
from tuner.predict.time.step import StepTime, step_breakdown, step_parts_ms, step_time_ms
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import layout_at

FOUR_RANKS = load_cluster("cpu-4")


def ranks_on(cores: int | None, count: int = 4, **fields: object) -> Cluster:
    """Return a cluster of `count` CPU ranks on so many cores."""
    size = {"gpus_per_node": count, "nvlink_domain_gpus": count, "cores": cores}
    return replace(FOUR_RANKS, **{**size, **fields})  # type: ignore[arg-type]


CPU = ranks_on(2)
DENSE = workload(dense(), precision="fp32")
MIXTURE = workload(mixture(), precision="fp32")


def tabulated(time_ms: Callable[..., float], *sizes: tuple[int, ...]) -> TimeTable:
    return TimeTable(sizes=sizes, ms=tuple(time_ms(*point) for point in itertools.product(*sizes)))


def collectives(time_ms: Callable[[int, int], float]) -> dict[Collective, TimeTable]:
    return {kind: tabulated(time_ms, (2, 4), (1024, 1 << 20)) for kind in get_args(Collective)}


CALIBRATION = Calibration(
    machine=Machine(device="cpu", name="a core", count=2, world_size=4, versions={}),
    measured_at="2026-01-01T00:00:00+00:00",
    host_us=30.0,
    gemm={"fp32": tabulated(lambda rows, out, into: 1e-8 * rows * out * into, *[(16, 256, 4096)] * 3)},
    copy=tabulated(lambda moved: 0.01 + 1e-7 * moved, tuple(1 << power for power in range(10, 25))),
    collectives=collectives(lambda ranks, whole: ranks + whole * 1e-6),
    strided_collectives=collectives(lambda ranks, whole: 2 * ranks + whole * 1e-6),
)


def ints(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def on_cpu(layout: Layout, on: Cluster = CPU, calibration: Calibration | None = None) -> StepTime:
    return step_breakdown(layout, DENSE, on, "torch", calibration)


def test_collectives_take_the_time_that_was_measured_for_near_or_strided_ranks() -> None:
    rates, message = MeasuredRates(DENSE, CPU, CALIBRATION), np.array([1024.0])
    near, strided = process_groups(ints(2), ints(1), CPU), process_groups(ints(2), ints(2), CPU)
    for call in (rates.gather_ms, rates.reduce_ms, rates.send_ms):
        assert call(message, near) == pytest.approx(2 + 1024e-6)
        assert call(message, strided) == pytest.approx(4 + 1024e-6)
    # Half of the buffer of an all-to-all between two ranks stays on the rank.
    inside_bytes, across_bytes = np.array([1 << 19], dtype=np.float64), np.zeros(1)
    assert rates.exchange_ms(inside_bytes, across_bytes, near) == pytest.approx(2 + (1 << 20) * 1e-6)


def test_groups_beyond_the_measured_world_take_what_the_cluster_states() -> None:
    wide = ranks_on(2, 16)
    groups, message = process_groups(ints(2, 8), ints(1, 1), wide), np.full(2, 65536.0)
    measured_ms = MeasuredRates(DENSE, wide, CALIBRATION).reduce_ms(message, groups)
    stated_ms = Rates(DENSE, wide).reduce_ms(message, groups)
    assert measured_ms[0] != pytest.approx(stated_ms[0])
    assert measured_ms[1] == stated_ms[1]


def test_groups_that_leave_their_nvlink_domain_take_what_the_cluster_states() -> None:
    islands = ranks_on(2, nvlink_domain_gpus=2)
    groups, message = process_groups(ints(2, 2), ints(1, 2), islands), np.full(2, 1024.0)
    measured_ms = MeasuredRates(DENSE, islands, CALIBRATION).gather_ms(message, groups)
    assert measured_ms[0] == pytest.approx(2 + 1024e-6)
    assert measured_ms[1] == Rates(DENSE, islands).gather_ms(message, groups)[1]


def test_products_take_the_measured_time_once_per_expert() -> None:
    rates = MeasuredRates(DENSE, CPU, CALIBRATION)
    forward_ms, backward_ms = rates.product_ms(np.array([256.0]), 256.0, 256.0)
    assert forward_ms == pytest.approx(1e-8 * 256**3)
    # The backward pass has two products and adds the gradient to its sum, which moves 8 bytes per weight.
    assert backward_ms == pytest.approx(2e-8 * 256**3 + 1e-7 * 8 * 256**2, rel=0.02)
    two_experts_ms, _ = rates.product_ms(np.array([512.0]), 256.0, 256.0, 2.0)
    assert two_experts_ms == pytest.approx(2 * forward_ms)


def test_products_in_a_precision_not_measured_take_what_the_cluster_states() -> None:
    narrow, wide = workload(dense(), precision="bf16"), cluster(4)
    rows = np.array([4096.0])
    measured_ms, _ = MeasuredRates(narrow, wide, CALIBRATION).product_ms(rows, 512.0, 512.0)
    stated_ms, _ = Rates(narrow, wide).product_ms(rows, 512.0, 512.0)
    assert measured_ms == stated_ms


@pytest.mark.parametrize("given_workload", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_calibrated_times_are_the_sum_of_their_parts(given_workload: Workload) -> None:
    table = enumerate_layouts(given_workload, CPU, default_domain(given_workload, CPU)).table
    table = table.sample(1000, random_state=1)
    times_ms = step_time_ms(table, given_workload, CPU, "torch", CALIBRATION)
    parts = step_parts_ms(table, given_workload, CPU, "torch", CALIBRATION)
    assert (parts >= 0).all(axis=None)
    assert parts.sum(axis=1).to_numpy() == pytest.approx(times_ms)
    first = step_breakdown(layout_at(table, 0), given_workload, CPU, "torch", CALIBRATION)
    assert first.total_ms == pytest.approx(times_ms[0])


def test_slower_launches_slow_the_host_alone() -> None:
    slower = replace(CALIBRATION, host_us=60.0)
    fast_host, slow_host = (on_cpu(Layout(), calibration=each) for each in (CALIBRATION, slower))
    assert slow_host.host_ms == pytest.approx(2 * fast_host.host_ms)
    assert slow_host.gemm_ms == fast_host.gemm_ms and slow_host.dp_ms == fast_host.dp_ms


def test_ranks_that_share_cores_fill_the_pipelines_bubble() -> None:
    core_per_rank, shared_cores = on_cpu(Layout(pp=4), ranks_on(None)), on_cpu(Layout(pp=4))
    # One of two cores still idles while only the first stage has work, and while only the last has.
    assert 0 < shared_cores.bubble_ms < core_per_rank.bubble_ms / 4
    # With pp 2 two pipelines fill at once, on one core each.
    assert on_cpu(Layout(pp=2)).bubble_ms == 0
    # With a single micro-batch one rank works at a time, and it has no more than one core.
    single_micro_batch = on_cpu(Layout(pp=4, micro_batch_size=DENSE.global_batch_size))
    assert single_micro_batch.bubble_ms > 0


def test_nothing_overlaps_on_cpu() -> None:
    overlapped = on_cpu(Layout(overlap_grad_reduce=True, overlap_param_gather=True))
    assert overlapped == on_cpu(Layout())
    interleaved = Layout(pp=2, vpp=2)
    assert on_cpu(replace(interleaved, overlap_p2p_comm=True)) == on_cpu(interleaved)


def test_gradients_in_16_bits_are_reduced_in_half_the_time() -> None:
    wide = workload(dense(hidden_size=1024, ffn_hidden_size=4096, kv_channels=128))
    plain = Layout(use_distributed_optimizer=False)
    fp32 = step_breakdown(plain, wide, cluster(8))
    half = step_breakdown(plain, replace(wide, grad_reduce_in_fp32=False), cluster(8))
    assert half.dp_ms == pytest.approx(fp32.dp_ms / 2, rel=0.05)


def test_weights_in_fp8_are_gathered_in_half_the_time() -> None:
    gpu = cluster(8).gpu
    narrow = cluster(8, gpu=replace(gpu, peak_tflops={**gpu.peak_tflops, "fp8": 2000.0}))
    fp8 = workload(dense(hidden_size=1024, ffn_hidden_size=4096, kv_channels=128), precision="fp8")
    bf16_weights, fp8_weights = (
        step_breakdown(Layout(), replace(fp8, fp8_param=fp8_param), narrow) for fp8_param in (False, True)
    )
    # Both scatter gradients of 4 bytes; one gathers weights of 2 bytes, the other weights of 1 byte.
    assert fp8_weights.dp_ms == pytest.approx(bf16_weights.dp_ms * 5 / 6, rel=0.05)


def test_fp8_weights_of_another_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8_param needs precision fp8 or mxfp8, not bf16"):
        workload(dense(), fp8_param=True)


def test_only_cpu_clusters_state_cores() -> None:
    with pytest.raises(ValueError, match=r"cores \(2\)"):
        cluster(4, cores=2)
