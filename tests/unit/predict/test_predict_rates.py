"""What the ranks do each thing at: the cluster's figures, and a calibration in their place."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from search_spaces.loader import load_cluster
from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout, layout_from
from tuner.predict.calibration import Calibration, Collective, Machine, TimeTable
from tuner.predict.time.collectives import process_groups
from tuner.predict.time.rates import MeasuredRates, Rates
from tuner.predict.time.step import STEP_PARTS, StepTime, step_breakdown, step_time_ms
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts


def ranks_on(cores: int | None, count: int = 4, **fields: object) -> Cluster:
    """CPU ranks on so many cores."""
    size = {"gpus_per_node": count, "nvlink_domain_gpus": count, "cores": cores}
    return replace(load_cluster("cpu-4"), **{**size, **fields})  # type: ignore[arg-type]


CPU = ranks_on(2)
DENSE = workload(dense(), precision="fp32")
MIXTURE = workload(mixture(), precision="fp32")


def tabulated(time_ms: Callable[..., float], *sizes: tuple[int, ...]) -> TimeTable:
    return TimeTable(sizes=sizes, ms=tuple(time_ms(*where) for where in itertools.product(*sizes)))


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


def test_collectives_take_as_long_as_measured_by_where_their_ranks_are() -> None:
    rates, message = MeasuredRates(DENSE, CPU, CALIBRATION), np.array([1024.0])
    near, apart = process_groups(ints(2), ints(1), CPU), process_groups(ints(2), ints(2), CPU)
    for call in (rates.gather_ms, rates.reduce_ms, rates.send_ms):
        assert call(message, near) == pytest.approx(2 + 1024e-6)
        assert call(message, apart) == pytest.approx(4 + 1024e-6)
    # Half of what an all-to-all of two ranks holds stays.
    sent, none = np.array([1 << 19], dtype=np.float64), np.zeros(1)
    assert rates.exchange_ms(sent, none, near) == pytest.approx(2 + (1 << 20) * 1e-6)


def test_groups_beyond_the_measured_world_take_what_the_cluster_states() -> None:
    wide = ranks_on(2, 16)
    ranks, message = process_groups(ints(2, 8), ints(1, 1), wide), np.full(2, 65536.0)
    measured = MeasuredRates(DENSE, wide, CALIBRATION).reduce_ms(message, ranks)
    stated = Rates(DENSE, wide).reduce_ms(message, ranks)
    assert measured[0] != pytest.approx(stated[0])
    assert measured[1] == stated[1]


def test_groups_that_leave_their_nvlink_domain_take_what_the_cluster_states() -> None:
    islands = ranks_on(2, nvlink_domain_gpus=2)
    ranks, message = process_groups(ints(2, 2), ints(1, 2), islands), np.full(2, 1024.0)
    measured = MeasuredRates(DENSE, islands, CALIBRATION).gather_ms(message, ranks)
    assert measured[0] == pytest.approx(2 + 1024e-6)
    assert measured[1] == Rates(DENSE, islands).gather_ms(message, ranks)[1]


def test_products_are_as_measured_each_expert_by_itself() -> None:
    rates = MeasuredRates(DENSE, CPU, CALIBRATION)
    one, back = rates.product_ms(np.array([256.0]), 256.0, 256.0)
    assert one == pytest.approx(1e-8 * 256**3)
    # Two products backward, and the gradient added to its sum: 8 bytes a weight.
    assert back == pytest.approx(2e-8 * 256**3 + 1e-7 * 8 * 256**2, rel=0.02)
    assert rates.product_ms(np.array([512.0]), 256.0, 256.0, 2.0)[0] == pytest.approx(2 * one)


def test_products_in_a_precision_not_measured_take_what_the_cluster_states() -> None:
    narrow, wide = workload(dense(), precision="bf16"), cluster(4)
    rows = np.array([4096.0])
    measured = MeasuredRates(narrow, wide, CALIBRATION).product_ms(rows, 512.0, 512.0)
    stated = Rates(narrow, wide).product_ms(rows, 512.0, 512.0)
    assert measured[0] == stated[0]


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_calibrated_times_are_the_sum_of_their_parts(name: str) -> None:
    given_workload = {"dense": DENSE, "mixture": MIXTURE}[name]
    domain = default_domain(given_workload, CPU)
    table = enumerate_layouts(given_workload, CPU, domain).table.sample(60, random_state=1)
    times = step_time_ms(table, given_workload, CPU, "torch", CALIBRATION)
    for (_, row), time_ms in zip(table.iterrows(), times, strict=True):
        parts = step_breakdown(layout_from(dict(row)), given_workload, CPU, "torch", CALIBRATION)
        assert all(getattr(parts, part) >= 0 for part in STEP_PARTS)
        assert time_ms == pytest.approx(parts.total_ms)


def test_slower_launches_slow_the_host_alone() -> None:
    slower = replace(CALIBRATION, host_us=60.0)
    once, twice = (on_cpu(Layout(), calibration=each) for each in (CALIBRATION, slower))
    assert twice.host_ms == pytest.approx(2 * once.host_ms)
    assert twice.gemm_ms == once.gemm_ms and twice.dp_ms == once.dp_ms


def test_ranks_that_share_cores_fill_the_pipelines_bubble() -> None:
    own, shared = on_cpu(Layout(pp=4), ranks_on(None)), on_cpu(Layout(pp=4))
    # What is left: one of two cores idles while the first stage alone has work, and the last.
    assert 0 < shared.bubble_ms < own.bubble_ms / 4
    # Two pipelines fill at once, a core each.
    assert on_cpu(Layout(pp=2)).bubble_ms == 0
    # With a single micro-batch one rank works at a time, and its core is no more than its own.
    alone = on_cpu(Layout(pp=4, micro_batch_size=DENSE.global_batch_size))
    assert alone.bubble_ms > 0


def test_nothing_overlaps_on_a_processor() -> None:
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
    wide, alone = (step_breakdown(Layout(), replace(fp8, fp8_param=only), narrow) for only in (False, True))
    # Gradients of 4 bytes scattered and weights of 2 gathered, against 4 and 1.
    assert alone.dp_ms == pytest.approx(wide.dp_ms * 5 / 6, rel=0.05)


def test_fp8_weights_of_another_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8_param needs precision fp8 or mxfp8, not bf16"):
        workload(dense(), fp8_param=True)


def test_cores_are_for_processors_alone() -> None:
    with pytest.raises(ValueError, match=r"cores \(2\)"):
        cluster(4, cores=2)
