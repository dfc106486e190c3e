"""A launcher samples this machine while a real job runs on it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.processes import MARKER
from launchers.watch.meters import CpuMeter
from launchers.watch.ownership import OwnProcesses
from launchers.watch.telemetry import FOREIGN_LOAD
from tests.integration.programs.measures import TIMED_S
from tests.trials import CLUSTER, spec_of
from tuner.core.layout import Layout
from tuner.trial.contract import Limits, Outcome, TrialFolder, TrialResult

PROGRAM = "tests.integration.programs.measures"
LAUNCHER = TorchrunLauncher(programs={"idles": PROGRAM, "works": PROGRAM}, grace_s=1.0)
CPU = replace(CLUSTER, device="cpu", gpus_per_node=2, nvlink_domain_gpus=2)
BUSY = "while True: pass"


def run(program: str, folder: TrialFolder, launcher: TorchrunLauncher = LAUNCHER) -> TrialResult:
    spec = replace(
        spec_of(0, Layout(), cluster=CPU),
        program=program,
        limits=Limits(startup_s=60.0, step_s=60.0, trial_s=60.0),
    )
    result = launcher.run(launcher.plan(spec, folder), threading.Event())
    assert result.outcome is Outcome.COMPLETED, result.reason
    return result


@contextmanager
def foreign_process() -> Iterator[None]:
    """Keep a core busy with a process that is no child of ours, since its parent has ended."""
    busy = f"[sys.executable, '-c', {BUSY!r}], stdout=subprocess.DEVNULL"  # our pipe would stay open with it
    start = f"import subprocess, sys; print(subprocess.Popen({busy}).pid)"
    pid = int(subprocess.check_output([sys.executable, "-c", start]))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_foreign_process_beside_the_trial_makes_it_suspect(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    folder.telemetry.write_text("an attempt before\n")
    with foreign_process():
        result = run("idles", folder)
    telemetry = result.telemetry
    assert telemetry is not None
    assert telemetry.foreign_load is not None
    cores = len(os.sched_getaffinity(0))
    assert telemetry.foreign_load > 0.4, "the busy process alone takes a core, or its share of it"
    (line,) = result.suspicions if telemetry.foreign_load > FOREIGN_LOAD * cores else ("of no weight here",)
    assert cores > 4 or f"of {cores} cores busy while steps were timed" in line
    assert telemetry.power_w is None and telemetry.throttle_reasons == ()
    assert TrialFolder(folder.set_aside(1)).telemetry.read_text() == "an attempt before\n"


def test_the_work_of_the_ranks_and_of_the_tuners_children_is_not_foreign(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "trials" / "t0000")
    folder.path.mkdir(parents=True)
    own_child = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        with Preload(tmp_path) as preload:
            result = run("works", folder, replace(LAUNCHER, start=preload.start))
    finally:
        own_child.kill()
        own_child.wait()
    samples = [json.loads(line) for line in folder.telemetry.read_text().splitlines()]
    timed = [sample["cpu"] | sample for sample in samples if sample["phase"] == "measure"]
    counted = [sample for sample in timed if sample["own_s"] is not None]
    assert len(counted) >= 2
    busy_s, own_s, window_s = (counted[-1][key] - counted[0][key] for key in ("busy_s", "own_s", "time_s"))
    used_s = sum(float((folder.path / f"used{rank}.txt").read_text()) for rank in range(2))
    assert own_s > 0.7 * used_s * window_s / TIMED_S
    assert result.telemetry is not None
    assert result.telemetry.samples == len(timed)
    assert result.telemetry.foreign_load == pytest.approx(max(0.0, (busy_s - own_s) / window_s))
    # Two ranks and the child claim more cores than a small machine has, so other processes get the rest only.
    assert result.telemetry.foreign_load < len(os.sched_getaffinity(0)) - own_s / window_s + 0.15


def test_a_process_is_the_trials_by_the_marker_of_the_trial_or_of_the_sweep(tmp_path: Path) -> None:
    trial = tmp_path / "night" / "trials" / "t0003"
    own_processes = OwnProcesses(trial)
    code = "import time; time.sleep(60)"
    markers = {trial: True, tmp_path / "night": True, tmp_path / "night" / "trials" / "t0004": False}
    for marker, expected in markers.items():
        child = subprocess.Popen([sys.executable, "-c", code], env={MARKER: str(marker)})
        try:
            assert own_processes.holds(child.pid) is expected
        finally:
            child.kill()
            child.wait()
    assert own_processes.holds(os.getpid())
    assert not own_processes.holds(1)
    assert os.getpid() in {process.pid for process in own_processes.processes()}


def test_a_look_at_the_cpu_takes_less_than_a_hundredth_of_a_core(tmp_path: Path) -> None:
    meter = CpuMeter(OwnProcesses(tmp_path))
    meter.read("measure")
    began_s = time.thread_time()
    for _ in range(50):
        meter.read("measure")
    assert (time.thread_time() - began_s) / 50 < 0.1 * 0.01 * max(1, len(psutil.pids()) / 100)
