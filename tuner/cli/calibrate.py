"""megatune calibrate: measures how fast this machine computes, copies and communicates."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from search_spaces.loader import load_cluster
from tuner.cli.common import AsJson, print_json, stderr, stdout
from tuner.cli.planning import detect, read_recipe
from tuner.cli.signals import stop_on_signals
from tuner.core.cluster import Cluster
from tuner.core.workload import Precision
from tuner.errors import InputError
from tuner.files import read_yaml_data, to_data
from tuner.predict.calibration import Calibration, CalibrationPlan, Collective, TimeTable
from tuner.sweep.resolution import load_sweep


def calibrate(
    cluster_or_sweep: Annotated[
        str,
        typer.Argument(
            metavar="[CLUSTER|SWEEP.yaml]",
            help="The cluster whose ranks are measured: its name, its file, or a sweep file. It must be this machine.",
        ),
    ] = "detect",
    force: Annotated[
        bool, typer.Option("--force", help="Measure again, even if a calibration is cached.")
    ] = False,
    json: AsJson = False,
) -> int:
    """Measure matrix products, memory and collectives on this machine once; predictions then use the figures.

    If other processes keep the cores busy, it waits for them, for up to a minute. If they go on, it measures
    nevertheless, says so, and records it with the calibration.
    """
    from launchers.machine.calibrate import cache_path, plan_for
    from launchers.machine.detect import check_machine

    cluster = _cluster(cluster_or_sweep)
    plan = plan_for(cluster)
    check_machine(cluster)
    cached = None if force else _cached(cluster)
    calibration = cached or _measure(plan)
    _print_suspicions(calibration)
    path = cache_path(plan.machine)
    if json:
        print_json({"path": str(path), "cached": cached is not None, "calibration": to_data(calibration)})
        return 0
    for table in _tables(calibration, cluster):
        stdout.print(table)
    origin = f"measured {calibration.measured_at}" + (", not again" if cached else "")
    stdout.print(f"{origin}; kept in {path}", markup=False, soft_wrap=True)
    return 0


def _print_suspicions(calibration: Calibration) -> None:
    for reason in calibration.suspicions:
        stderr.print(f"disturbed: {reason}", markup=False)
    if calibration.suspicions:
        stderr.print(
            "Predictions from it may be wrong: measure again with --force once the machine is quiet."
        )


def _cached(cluster: Cluster) -> Calibration | None:
    """The cached calibration of this machine; None if there is none, or it cannot be read."""
    from launchers.machine.calibrate import load_calibration

    try:
        return load_calibration(cluster)
    except InputError as error:
        stderr.print(f"measuring again: {error}", markup=False)
        return None


def _measure(plan: CalibrationPlan) -> Calibration:
    """Measure this machine, and cache the calibration; Ctrl-C and SIGTERM end it."""
    from launchers.machine.calibrate import calibrate as measure
    from launchers.machine.quiet import wait_for_quiet

    stderr.print(
        f"measuring {plan.machine.world_size} ranks at once on {plan.machine.name}: "
        "it takes a minute or two, in which nothing else should run here",
        markup=False,
    )
    with stop_on_signals("ending the calibration; nothing is kept") as stop:
        wait_for_quiet(stop, lambda text: stderr.print(text, markup=False))
        return measure(plan, stop)


def _cluster(name: str) -> Cluster:
    """The cluster that the user names: by its name or file, or by a sweep file that runs on it."""
    if name == "detect":
        return detect()
    if Path(name).suffix in {".yaml", ".yml"}:
        data = read_yaml_data(Path(name))
        if isinstance(data, dict) and "workload" in data:
            return load_sweep(Path(name), detect, read_recipe).cluster
    return load_cluster(name)


def _tables(calibration: Calibration, cluster: Cluster) -> list[Table]:
    tables = [_products(calibration, cluster), _operations(calibration, cluster)]
    return [*tables, _collectives(calibration, cluster)] if calibration.collectives else tables


def _products(calibration: Calibration, cluster: Cluster) -> Table:
    """The rates of the measured products of square matrices, and the peaks that the cluster states, per precision."""
    table = Table("TFLOP/s of n x n x n", *calibration.gemm, box=None)
    times = next(iter(calibration.gemm.values()))
    for size in times.sizes[0]:
        rates = (_tflops(calibration, size, precision) for precision in calibration.gemm)
        table.add_row(f"n = {size}", *(f"{rate:.3g}" for rate in rates))
    stated = (cluster.gpu.peak_tflops[precision] for precision in calibration.gemm)
    table.add_row(f"[dim]peak that {cluster.name} states", *(f"[dim]{peak:g}" for peak in stated))
    return table


def _tflops(calibration: Calibration, size: int, precision: Precision) -> float:
    """The measured rate of a product of two square matrices with `size` rows each."""
    return 2 * size**3 / float(calibration.gemm_ms(size, size, size, precision)) * 1e-9


def _operations(calibration: Calibration, cluster: Cluster) -> Table:
    """The time and the bandwidth of elementwise copies by their size, and the time that the host needs per launch."""
    table = Table("elementwise, read and written", "us", "GB/s", box=None)
    for size in calibration.copy.sizes[0]:
        time_ms = float(calibration.copy_ms(size))
        table.add_row(_size(size), _us(time_ms), f"{size / time_ms * 1e-6:.3g}")
    table.add_row("one operation launched by the host", _us(calibration.host_us / 1000), "")
    table.add_row(
        f"[dim]bandwidth that {cluster.name} states", "", f"[dim]{cluster.gpu.memory_bandwidth_gb_per_s:g}"
    )
    return table


def _collectives(calibration: Calibration, cluster: Cluster) -> Table:
    """Latency and bus bandwidth of each collective and group size, between neighbours and between ranks far apart."""
    smallest, largest = (next(iter(calibration.collectives.values())).sizes[1][end] for end in (0, -1))
    table = Table("collective", "ranks", box=None)
    for place in ("neighbours", "far apart"):
        table.add_column(f"{place}: {_size(smallest)} us", justify="right")
        table.add_column(f"{_size(largest)} bus GB/s", justify="right")
    for kind, times in calibration.collectives.items():
        for ranks in times.sizes[0]:
            far_apart = calibration.strided_collectives[kind]
            table.add_row(kind, str(ranks), *_cells(times, kind, ranks), *_cells(far_apart, kind, ranks))
    latency, bandwidth = f"{cluster.nvlink_latency_us:g}", f"{cluster.nvlink_bandwidth_gb_per_s:g}"
    stated = (f"[dim]{latency}", f"[dim]{bandwidth}") * 2
    table.add_row(f"[dim]a hop and a link, as {cluster.name} states", "", *stated)
    return table


def _cells(times: TimeTable, kind: Collective, ranks: int) -> tuple[str, str]:
    """The time of the smallest message in us, and the bus bandwidth of the largest in GB/s."""
    smallest, largest = times.sizes[1][0], times.sizes[1][-1]
    moved = largest * _bus_share(kind, ranks)
    return _us(float(times.at(ranks, smallest))), f"{moved / float(times.at(ranks, largest)) * 1e-6:.3g}"


def _bus_share(kind: Collective, ranks: int) -> float:
    """The bytes that cross a rank's link per byte of the buffer. Published: NVIDIA nccl-tests, doc/PERFORMANCE.md."""
    if kind == "send":
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks


def _us(time_ms: float) -> str:
    """A time as text in microseconds, with at least three digits."""
    time_us = time_ms * 1000
    return f"{time_us:,.0f}" if time_us >= 100 else f"{time_us:.3g}"


def _size(size_bytes: int) -> str:
    """A size as text in the largest unit that it fills."""
    for unit_bytes, unit in ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:g} {unit}"
    return f"{size_bytes} B"
