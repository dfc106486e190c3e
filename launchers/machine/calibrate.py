"""Calibrates this machine under torchrun, and stores the calibration in the user's cache, one file per machine."""

import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launchers.machine.identity import this_machine
from launchers.processes import (
    LOOPBACK,
    MARKER,
    ColdJob,
    inherited_environment,
    loopback_torchrun,
    python_path,
)
from launchers.watch import logs
from launchers.watch.gpus import GpuSelection
from launchers.watch.log_text import failed_ranks
from launchers.watch.meters import Sample
from launchers.watch.sampling import Sampler
from launchers.watch.telemetry import summarise, suspicions
from tuner.core.cluster import Cluster
from tuner.core.workload import Precision
from tuner.errors import InputError, MegatuneError
from tuner.files import read_json, write_json
from tuner.predict.calibration import Calibration, CalibrationPlan, Machine, plan_calibration
from tuner.trial.contract import TrialFolder

PROGRAM = "launchers.programs.calibration"
LIMIT_S = 600.0
"""The time limit of a calibration, in seconds. Assumed; it was measured to take one minute, or two if many ranks import
torch on few cores."""

_MEASURED: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "fp8")
"""The precisions in which the calibration program can time matrix products."""
_GRACE_S = 5.0
_POLL_S = 0.1


def cache_path(machine: Machine) -> Path:
    """Return the path of the file for a machine's calibration, under $XDG_CACHE_HOME or ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # by the XDG specification, a relative path counts as none
        root = Path.home() / ".cache"
    return root / "megatune" / "calibrations" / f"{machine.fingerprint}.json"


def load_calibration(cluster: Cluster) -> Calibration | None:
    """Return this machine's stored calibration for a cluster; None if there is none, or the cluster is another machine.

    Raises:
        InputError: if the file of the calibration exists but cannot be used.
    """
    machine = this_machine(cluster)
    if machine is None or not (path := cache_path(machine)).exists():
        return None
    try:
        calibration = read_json(Calibration, path)
        if calibration.machine != machine:
            raise InputError(f"{path}: is the calibration of another machine, {calibration.machine.name}")
    except InputError as error:
        raise InputError(
            f"{error}\nMeasure it again with `megatune calibrate --force`, or delete it."
        ) from None
    return calibration


def plan_for(cluster: Cluster) -> CalibrationPlan:
    """Return the plan of a calibration for a cluster: what to measure on this machine.

    Raises:
        InputError: if this machine is not the cluster's, or the cluster states the peak of no precision that can be
            measured.
    """
    machine = this_machine(cluster)
    if machine is None:
        wanted = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
        raise InputError(
            f"cluster '{cluster.name}' is {wanted}, and this machine is not: a calibration measures the machine it "
            "runs on; run it there, on one node, or name no cluster to measure what is here"
        )
    precisions = tuple(precision for precision in _MEASURED if precision in cluster.gpu.peak_tflops)
    if not precisions:
        raise InputError(
            f"cluster '{cluster.name}': key 'gpu.peak_tflops' states none of {', '.join(_MEASURED)}, "
            "whose products can be measured"
        )
    return plan_calibration(machine, precisions)


def calibrate(plan: CalibrationPlan, stop: threading.Event, limit_s: float = LIMIT_S) -> Calibration:
    """Measure this machine, store the calibration at the machine's `cache_path`, and return it.

    The call blocks until all processes of the job have ended. It ends the job when `stop` is set.

    Raises:
        InputError: if the cache cannot be written.
        KeyboardInterrupt: if `stop` was set.
        MegatuneError: if the job failed or took longer than `limit_s` seconds. The error names the job's folder, which
            is not deleted.
    """
    path = cache_path(plan.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="running-", dir=path.parent))
        sampler = _sampler(plan.machine, folder, limit_s)
        sampler.start()
        try:
            problem = _run(plan, folder, stop, limit_s)
        finally:
            samples = sampler.end()
        if stop.is_set():
            shutil.rmtree(folder)
            raise KeyboardInterrupt
        if problem:
            raise MegatuneError(f"the calibration {problem} (its output is kept in {folder})")
        calibration = replace(
            read_json(Calibration, folder / "calibration.json"), suspicions=_suspicions(samples)
        )
        write_json(path, calibration)
        shutil.rmtree(folder)
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be written: {error.strerror or error}; "
            "choose another place with XDG_CACHE_HOME"
        ) from None
    return calibration


def _sampler(machine: Machine, folder: Path, limit_s: float) -> Sampler:
    """Return a sampler of the machine's telemetry, whose samples get the phase `measure` once the job measures."""
    files = TrialFolder(folder)
    gpus = GpuSelection(
        0 if machine.device == "cpu" else machine.world_size, os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    return Sampler(files, gpus, limit_s, lambda: "measure" if files.heartbeat.exists() else "startup")


def _suspicions(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return reasons not to trust the measured times, derived from telemetry, one line per reason."""
    telemetry = summarise(samples, None)
    cores = len(os.sched_getaffinity(0))
    return () if telemetry is None else suspicions(telemetry, cores, "during the calibration")


def _run(plan: CalibrationPlan, folder: Path, stop: threading.Event, limit_s: float) -> str:
    """Run the calibration program to its end; return a phrase that says what went wrong, or an empty text."""
    log = folder / "log"
    log.mkdir()
    write_json(folder / "plan.json", plan)
    argv = (
        *loopback_torchrun(plan.machine.world_size, "calibration", log),
        "-m",
        PROGRAM,
        str(folder / "plan.json"),
        str(folder / "calibration.json"),
    )
    environment = {**inherited_environment(), **_environment(plan.machine, folder)}
    deadline_s = time.monotonic() + limit_s
    job = ColdJob(argv, environment, folder, log / "torchrun.log")
    try:
        while not (ended := job.ended()) and time.monotonic() < deadline_s and not stop.wait(_POLL_S):
            pass
    finally:
        survivors = job.end(_GRACE_S)
    if survivors:
        return f"left processes {', '.join(map(str, survivors))} that even SIGKILL does not end"
    if not ended:
        return f"did not end within {limit_s:g} s"
    return "" if job.exit_code == 0 else f"failed: {_last_words(log)}"


def _environment(machine: Machine, folder: Path) -> Mapping[str, str]:
    """Return the environment variables that the job gets in addition to inherited ones, as a trial here gets them."""
    on_cpu = machine.device == "cpu"
    env = {
        MARKER: str(folder),
        "PYTHONPATH": os.pathsep.join(python_path()),
        "OMP_NUM_THREADS": str(max(1, machine.count // machine.world_size) if on_cpu else 1),
        **LOOPBACK,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(_GRACE_S)),
    }
    return env | {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else env


def _last_words(log: Path) -> str:
    """Return the last line in the stderr.log of the first rank that failed, or else in torchrun's log."""
    report = logs.tail(log / "torchrun.log")
    for rank in failed_ranks(report):
        for path in log.glob(f"*/attempt_0/{rank}/stderr.log"):
            if lines := logs.tail(path).strip().splitlines():
                return f"rank {rank}: {lines[-1]}"
    lines = report.strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"
