"""megatune doctor: checks whether this machine can run trials."""

import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from tuner.cli.common import AsJson, ResultsRoot, print_json, stdout
from tuner.cli.planning import detect
from tuner.errors import InputError
from tuner.rules.releases import how_tested

Status = Literal["ok", "missing", "failed"]
"""The state of a check; `missing` is no fault, but says that something optional is not installed."""

MIN_FREE_GIB = 5.0
"""The least free space on the disk: below it the logs and databases of a night may fill the disk. Assumed."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    detail: str
    """What was found, or what is wrong."""


def doctor(results: ResultsRoot = Path("results"), json: AsJson = False) -> int:
    """Check everything that a trial needs on this machine. Exit code 0 if trials can run, 2 if not."""
    checks = [
        Check("python", "ok", platform.python_version()),
        _package("torch", optional=False),
        _package("megatron-core", optional=False, note=how_tested),
        *(_package(name, optional=False) for name in ("optuna", "mlflow")),
        _package("transformer-engine", optional=True),
        _try("megatron imports", _import_megatron),
        _try("machine", _machine),
        _calibration(),
        _try("gloo on loopback", _gloo),
        _try("results folder", lambda: _writable(results)),
    ]
    if json:
        print_json([{"check": check.name, "status": check.status, "told": check.detail} for check in checks])
    else:
        table = Table("check", "status", "what", box=None)
        colours = {"ok": "green", "missing": "yellow", "failed": "red"}
        for check in checks:
            table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.detail))
        stdout.print(table)
    return 2 if any(check.status == "failed" for check in checks) else 0


def _try(name: str, check: Callable[[], str]) -> Check:
    """Run a check that returns what it found, or raises; any error is reported, and the other checks still run."""
    try:
        return Check(name, "ok", check())
    except Exception as error:
        return Check(name, "failed", f"{type(error).__name__}: {error}")


def _package(name: str, optional: bool, note: Callable[[str], str] | None = None) -> Check:
    """Whether a package is installed, and its version, followed by what `note` returns for this version."""
    try:
        installed = version(name)
        return Check(name, "ok", installed if note is None else f"{installed}, {note(installed)}")
    except PackageNotFoundError:
        if optional:
            return Check(
                name,
                "missing",
                "trials on GPUs run Torch's own layers instead, and predictions are for these",
            )
        return Check(name, "failed", f"not installed: pip install {name}")


def _import_megatron() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks of the packages report what is missing
        from launchers.programs.megatron_core import train

    return f"the program {train.__package__} loads"


def _machine() -> str:
    cluster = detect()
    return (
        f"{cluster.world_size} x {cluster.gpu.name} with {cluster.gpu.memory_gib} GiB "
        f"(in a sweep file: 'cluster: detect', {', '.join(cluster.gpu.peak_tflops)})"
    )


def _calibration() -> Check:
    from launchers.machine.calibrate import load_calibration

    try:
        calibration = load_calibration(detect())
    except InputError as error:
        return Check("calibration", "failed", str(error))
    if calibration is None:
        detail = "predictions use the cluster's stated figures; `megatune calibrate` measures this machine"
        return Check("calibration", "missing", detail)
    return Check("calibration", "ok", f"{calibration.machine.name}, measured {calibration.measured_at}")


def _gloo() -> str:
    from launchers.machine.rendezvous import check_store

    return f"a rendezvous store answers on 127.0.0.1:{check_store()}"


def _writable(results: Path) -> str:
    existing = next(path for path in (results.absolute(), *results.absolute().parents) if path.exists())
    probe = existing / ".megatune-probe"
    probe.write_text("probe", encoding="utf-8")
    probe.unlink()
    free_gib = shutil.disk_usage(existing).free / 1024**3
    if free_gib < MIN_FREE_GIB:
        raise InputError(
            f"only {free_gib:.1f} GiB free in {existing}; the sweep of a night needs {MIN_FREE_GIB:.0f}"
        )
    return f"{results.absolute()}: writable, {free_gib:.0f} GiB free"
