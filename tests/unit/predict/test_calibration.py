"""Look-ups in measured times, and the machine that a calibration belongs to."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.machine.calibrate import cache_path, load_calibration, plan_for
from launchers.machine.identity import this_machine
from search_spaces.loader import load_cluster
from tuner.cli.app import run
from tuner.core.cluster import Cluster
from tuner.errors import InputError
from tuner.files import parse, read_json, to_data, write_json
from tuner.predict.calibration import Calibration, Collective, Machine, TimeTable, plan_calibration

MACHINE = Machine(device="cpu", name="a core", count=2, world_size=4, versions={"torch": "2.13.0"})
KINDS: tuple[Collective, ...] = get_args(Collective)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def tabulated(time_ms: Callable[..., float], *sizes: tuple[int, ...]) -> TimeTable:
    return TimeTable(sizes=sizes, ms=tuple(time_ms(*point) for point in itertools.product(*sizes)))


def collective_times(time_ms: Callable[[int, int], float]) -> dict[Collective, TimeTable]:
    return {kind: tabulated(time_ms, (2, 4), (1024, 16384, 1 << 20)) for kind in KINDS}


CALIBRATION = Calibration(
    machine=MACHINE,
    measured_at="2026-01-01T00:00:00+00:00",
    host_us=20.0,
    gemm={"fp32": tabulated(lambda rows, out, into: 1e-8 * rows * out * into, *[(16, 64, 256)] * 3)},
    copy=tabulated(lambda moved: 0.01 + 1e-7 * moved, (1024, 65536, 1 << 22)),
    collectives=collective_times(lambda ranks, whole: ranks * 1.0 + whole * 1e-6),
    strided_collectives=collective_times(lambda ranks, whole: ranks * 2.0 + whole * 1e-6),
)


@st.composite
def time_tables(draw: st.DrawFn, ascending: bool = False) -> TimeTable:
    """Draw a table of up to three axes; with `ascending` a table of one axis whose times grow with size."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=1 if ascending else 3))
    sizes = [np.unique((10 ** random.uniform(0, 9, length)).astype(int)).tolist() for length in lengths]
    ms = 10 ** random.uniform(-4, 4, np.prod([len(axis) for axis in sizes]))
    return TimeTable(sizes=tuple(map(tuple, sizes)), ms=tuple((np.sort(ms) if ascending else ms).tolist()))


@given(time_tables())
def test_at_the_measured_points_the_time_is_the_measured_one(measured: TimeTable) -> None:
    points = np.array(list(itertools.product(*measured.sizes)), dtype=float).T
    assert measured.at(*points) == pytest.approx(measured.ms, rel=1e-9)


@given(time_tables(ascending=True), st.lists(st.floats(0, 1e12), min_size=2, max_size=20))
def test_interpolated_times_grow_with_size_if_the_measured_times_do(
    measured: TimeTable, sizes: list[float]
) -> None:
    times_ms = measured.at(np.sort(sizes))
    assert (np.diff(times_ms) >= -1e-9 * times_ms[1:]).all()


@given(time_tables(), st.integers(0, 2), st.floats(1, 1e6))
def test_beyond_the_largest_size_the_time_grows_in_proportion(
    measured: TimeTable, axis: int, factor: float
) -> None:
    largest = [float(sizes[-1]) for sizes in measured.sizes]
    axis %= len(largest)
    larger = [size * (factor if place == axis else 1) for place, size in enumerate(largest)]
    assert measured.at(*larger) == pytest.approx(factor * measured.ms[-1], rel=1e-6)


@given(time_tables(), st.floats(0, 1))
def test_below_the_smallest_size_the_time_stays(measured: TimeTable, share: float) -> None:
    smaller = [share * sizes[0] for sizes in measured.sizes]
    assert measured.at(*smaller) == pytest.approx(measured.ms[0], rel=1e-9)


@given(st.floats(16, 256), st.floats(16, 256), st.floats(16, 256))
def test_a_power_law_is_interpolated_exactly(rows: float, out: float, into: float) -> None:
    assert CALIBRATION.gemm_ms(rows, out, into, "fp32") == pytest.approx(1e-8 * rows * out * into, rel=1e-9)


def test_many_sizes_are_looked_up_at_once_and_broadcast() -> None:
    times_ms = CALIBRATION.gemm_ms(np.array([[16], [32]]), np.array([16, 64, 100]), 256, "fp32")
    assert times_ms.shape == (2, 3)
    assert times_ms[1, 2] == pytest.approx(float(CALIBRATION.gemm_ms(32, 100, 256, "fp32")))


def test_a_precision_without_measured_products_is_refused() -> None:
    with pytest.raises(InputError, match=r"a core has no matrix products in bf16 \(it has fp32\)"):
        CALIBRATION.gemm_ms(16, 16, 16, "bf16")


@given(st.sampled_from(KINDS), st.floats(1, 1e9), st.booleans())
def test_a_lone_rank_communicates_in_no_time(kind: Collective, whole_bytes: float, strided: bool) -> None:
    one_rank_ms, two_ranks_ms = CALIBRATION.collective_ms(kind, whole_bytes, np.array([1, 2]), strided)
    assert one_rank_ms == 0 < two_ranks_ms


@given(st.sampled_from(KINDS), st.floats(1, 1e9), st.integers(2, 64))
def test_a_larger_group_takes_no_less_time(kind: Collective, whole_bytes: float, ranks: int) -> None:
    few, more = CALIBRATION.collective_ms(kind, whole_bytes, np.array([ranks, ranks + 1]))
    assert more >= few * (1 - 1e-9)


def test_in_groups_larger_than_measured_latency_grows_with_hops_and_the_rest_with_the_share_that_leaves() -> (
    None
):
    smallest, largest = (float(CALIBRATION.collective_ms("all_gather", size, 4)) for size in (1024, 1 << 20))
    times_ms = CALIBRATION.collective_ms("all_gather", np.array([1024, 1 << 20]), 8)
    expected = [smallest * 7 / 3, smallest * 7 / 3 + (largest - smallest) * (7 / 8) / (3 / 4)]
    assert times_ms == pytest.approx(expected)
    assert CALIBRATION.collective_ms("send", 1024, 8) == CALIBRATION.collective_ms("send", 1024, 4)


def test_strided_groups_have_times_of_their_own() -> None:
    assert CALIBRATION.collective_ms("send", 1024, 2, strided=True) == pytest.approx(4.001024)
    assert CALIBRATION.collective_ms("send", 1024, 2) == pytest.approx(2.001024)


def test_one_rank_alone_needs_no_collectives_and_has_none() -> None:
    alone = replace(CALIBRATION, collectives={}, strided_collectives={})
    assert alone.collective_ms("all_reduce", np.ones(3), np.ones(3)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no all_reduce was measured"):
        alone.collective_ms("all_reduce", 1.0, np.array([1, 2]))


@pytest.mark.parametrize(
    "other",
    [
        replace(MACHINE, device="cuda"),
        replace(MACHINE, name="another core"),
        replace(MACHINE, count=3),
        replace(MACHINE, world_size=2),
        replace(MACHINE, versions={"torch": "2.13.1"}),
        replace(MACHINE, versions={**MACHINE.versions, "driver": "580"}),
        replace(MACHINE, schema_version=MACHINE.schema_version + 1),
    ],
)
def test_each_ingredient_changes_the_fingerprint(other: Machine) -> None:
    assert other.fingerprint != MACHINE.fingerprint
    assert replace(MACHINE).fingerprint == MACHINE.fingerprint


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    write_json(tmp_path / "calibration.json", CALIBRATION)
    assert read_json(Calibration, tmp_path / "calibration.json") == CALIBRATION


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("copy", {"sizes": [[1, 2, 4]], "ms": [1.0, 2.0]}, "2 times for 3 = 3 combinations"),
        ("copy", {"sizes": [[4, 2]], "ms": [1.0, 2.0]}, "ascend"),
        ("copy", {"sizes": [[2, 4]], "ms": [1.0, 0.0]}, "above 0"),
        ("copy", {"sizes": [[2], [4]], "ms": [1.0]}, "one axis"),
        ("gemm", {}, "at least one precision"),
        ("gemm", {"fp32": {"sizes": [[2]], "ms": [1.0]}}, "three axes"),
        ("collectives", {}, "of the same kinds"),
        ("host_us", -1.0, "host_us must be above 0"),
    ],
)
def test_a_calibration_that_contradicts_itself_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(Calibration, {**to_data(CALIBRATION), key: value}, "calibration.json")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_planned_sizes_make_a_valid_table(device: str) -> None:
    plan = plan_calibration(replace(MACHINE, device=device), ("fp32",))  # type: ignore[arg-type]
    for sizes in (plan.gemm_sizes, plan.copy_bytes, plan.message_bytes):
        assert tabulated(float, sizes).at(sizes[1]) == pytest.approx(sizes[1])


def this_cluster(world_size: int = 4) -> Cluster:
    return replace(load_cluster("cpu-4"), gpus_per_node=world_size)


def test_this_machine_is_a_cluster_of_cpu_ranks_and_not_one_of_absent_gpus() -> None:
    machine = this_machine(this_cluster())
    assert machine is not None
    assert (machine.device, machine.world_size) == ("cpu", 4)
    assert machine.name and machine.versions["torch"]
    assert this_machine(replace(this_cluster(), nodes=2)) is None
    assert this_machine(load_cluster("gb300-nvl72", nodes=1)) is None


def test_a_calibration_is_found_by_the_number_of_ranks_that_measured_it(tmp_path: Path) -> None:
    machine = plan_for(this_cluster()).machine
    assert load_calibration(this_cluster()) is None
    path = cache_path(machine)
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    write_json(path, replace(CALIBRATION, machine=machine))
    assert load_calibration(this_cluster()) == replace(CALIBRATION, machine=machine)
    assert load_calibration(this_cluster(world_size=2)) is None
    assert load_calibration(load_cluster("gb300-nvl72", nodes=1)) is None


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_path(MACHINE).is_relative_to("/home/someone/.cache/megatune")


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_a_cached_file_that_is_torn_or_of_another_machine_is_refused_with_a_remedy(
    text: str | None,
) -> None:
    path = cache_path(plan_for(this_cluster()).machine)
    path.parent.mkdir(parents=True)
    write_json(path, CALIBRATION)
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"(?s){path.name}: .*megatune calibrate --force"):
        load_calibration(this_cluster())


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("gb300-nvl72", "18 x 4 NVIDIA GB300, and this machine is not"),
        ("cpu-5", "unknown cluster 'cpu-5' (did you mean 'cpu-4'?)"),
        ("missing.yaml", "missing.yaml: cannot be read"),
    ],
)
def test_a_cluster_that_is_not_this_machine_is_not_calibrated(
    capsys: pytest.CaptureFixture[str], cluster: str, message: str
) -> None:
    assert run(["calibrate", cluster]) == 2
    assert message in capsys.readouterr().err
