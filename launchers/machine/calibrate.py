"""Calibrates this machine under torchrun, and keeps what was measured, one file a fingerprint."""

import math
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import distributions, version
from pathlib import Path

import pynvml

from launchers.processes import MARKER, ColdJob, inherited_environment, python_path
from launchers.watch import logs
from launchers.watch.log_text import failed_ranks
from tuner.core.cluster import Cluster
from tuner.core.workload import Precision
from tuner.errors import InputError, MegatuneError
from tuner.files import read_json, write_json
from tuner.predict.calibration import Calibration, CalibrationPlan, Machine, plan_calibration

PROGRAM = "launchers.programs.calibration"
LIMIT_S = 600.0
"""A calibration takes about a minute, with the imports of many ranks on few cores two."""

_MEASURED: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "fp8")
"""The precisions whose products the program knows how to call."""
_GRACE_S = 5.0
_POLL_S = 0.1


def this_machine(cluster: Cluster) -> Machine | None:
    """This machine in the part of a cluster, or None if it is not the cluster's; asks the driver, never torch."""
    if cluster.nodes > 1:
        return None
    versions = {"python": platform.python_version(), "torch": version("torch")}
    if cluster.device == "cpu":
        name, count = _processor(), len(os.sched_getaffinity(0))
    else:
        name, (count, driver) = cluster.gpu.name, _gpus(cluster.gpu.name)
        if cluster.world_size > count:
            return None
        versions |= {"driver": driver, **_cuda_libraries()}
    return Machine(
        device=cluster.device, name=name, count=count, world_size=cluster.world_size, versions=versions
    )


def cache_path(machine: Machine) -> Path:
    """Where a machine's calibration is kept: under $XDG_CACHE_HOME, else ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # the XDG specification: a relative path counts as none
        root = Path.home() / ".cache"
    return root / "megatune" / "calibrations" / f"{machine.fingerprint}.json"


def load_calibration(cluster: Cluster) -> Calibration | None:
    """What was measured on this machine, if it is the cluster's and was calibrated.

    Raises:
        InputError: if the file is there and cannot be used.
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
    """What to measure for a cluster on this machine.

    Raises:
        InputError: if this machine is not the cluster's.
    """
    machine = this_machine(cluster)
    if machine is None:
        wanted = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
        raise InputError(
            f"cluster '{cluster.name}' is {wanted}, and this machine is not: a calibration measures the machine it "
            "runs on; run it there, on one node, or name no cluster to measure what is here"
        )
    known = tuple(precision for precision in _MEASURED if precision in cluster.gpu.peak_tflops)
    if not known:
        raise InputError(
            f"cluster '{cluster.name}': key 'gpu.peak_tflops' states none of {', '.join(_MEASURED)}, "
            "whose products can be measured"
        )
    return plan_calibration(machine, known)


def calibrate(plan: CalibrationPlan, stop: threading.Event, limit_s: float = LIMIT_S) -> Calibration:
    """Measure, and keep it at the machine's `cache_path`.

    Blocks. When `stop` is set, ends the job. No process of it outlives the call.

    Raises:
        InputError: if the cache cannot be written.
        KeyboardInterrupt: if `stop` was set.
        MegatuneError: if the job failed or took longer than `limit_s`; its folder is kept and named.
    """
    path = cache_path(plan.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="running-", dir=path.parent))
        problem = _run(plan, folder, stop, limit_s)
        if stop.is_set():
            shutil.rmtree(folder)
            raise KeyboardInterrupt
        if problem:
            raise MegatuneError(f"the calibration {problem} (its output is kept in {folder})")
        calibration = read_json(Calibration, folder / "calibration.json")
        write_json(path, calibration)
        shutil.rmtree(folder)
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be written: {error.strerror or error}; "
            "choose another place with XDG_CACHE_HOME"
        ) from None
    return calibration


def _run(plan: CalibrationPlan, folder: Path, stop: threading.Event, limit_s: float) -> str:
    """Run the program to its end; returns what went wrong, empty if nothing did."""
    log = folder / "log"
    log.mkdir()
    write_json(folder / "plan.json", plan)
    argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1"]
    argv += [f"--nproc-per-node={plan.machine.world_size}", "--max-restarts=0"]
    argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=calibration"]
    argv += ["--local-addr=127.0.0.1", f"--log-dir={log}", "--redirects=3"]
    argv += ["-m", PROGRAM, str(folder / "plan.json"), str(folder / "calibration.json")]
    environment = {**inherited_environment(), **_environment(plan.machine, folder)}
    deadline_s = time.monotonic() + limit_s
    job = ColdJob(tuple(argv), environment, folder, log / "torchrun.log")
    try:
        while not (ended := job.ended()) and time.monotonic() < deadline_s and not stop.wait(_POLL_S):
            pass
    finally:
        left = job.end(_GRACE_S)
    if left:
        return f"left processes {', '.join(map(str, left))} that even SIGKILL does not end"
    if not ended:
        return f"did not end within {limit_s:g} s"
    return "" if job.exit_code == 0 else f"failed: {_last_words(log)}"


def _environment(machine: Machine, folder: Path) -> Mapping[str, str]:
    """As a trial's: the threads of a rank, and Gloo on the loopback."""
    on_cpu = machine.device == "cpu"
    env = {
        MARKER: str(folder),
        "PYTHONPATH": os.pathsep.join(python_path()),
        "OMP_NUM_THREADS": str(max(1, machine.count // machine.world_size) if on_cpu else 1),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(_GRACE_S)),
    }
    return env | {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else env


def _last_words(log: Path) -> str:
    """The last line of the first rank that failed, or of torchrun."""
    report = logs.tail(log / "torchrun.log")
    for rank in failed_ranks(report):
        for path in log.glob(f"*/attempt_0/{rank}/stderr.log"):
            if lines := logs.tail(path).strip().splitlines():
                return f"rank {rank}: {lines[-1]}"
    lines = report.strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        for key, _, value in (line.partition(":") for line in lines):
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()


def _cuda_libraries() -> dict[str, str]:
    """The versions of what torch's wheel brings as packages; other builds carry them in torch's own version."""
    libraries = ("nvidia-nccl", "nvidia-cuda-runtime", "nvidia-cublas")
    return {each.name: each.version for each in distributions() if (each.name or "").startswith(libraries)}


def _gpus(name: str) -> tuple[int, str]:
    """How many GPUs of a model there are, and the driver's version."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0, ""
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        count = sum(pynvml.nvmlDeviceGetName(handle) == name for handle in handles)
        return count, str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
