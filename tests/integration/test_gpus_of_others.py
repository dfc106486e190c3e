"""A launcher runs trials on pretended GPUs that others use too: a stand-in of NVML, compiled, tells of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cuda.gpus import B200, H100, PretendedGpu, build_nvml, environment, write_machine
from tuner.files import read_json
from tuner.trial.contract import Outcome, TrialFolder, TrialResult

RUN = """
import sys, threading
from dataclasses import replace
from pathlib import Path
from launchers.local.torchrun import TorchrunLauncher
from tests.faults import Programs, spec_for
from tests.trials import CLUSTER
from tuner.trial.contract import TrialFolder

cluster = replace(CLUSTER, gpus_per_node=2, nvlink_domain_gpus=2)
launcher = TorchrunLauncher(programs=Programs(), grace_s=1.0)
plan = launcher.plan(replace(spec_for(sys.argv[1]), cluster=cluster), TrialFolder(Path(sys.argv[2])))
began = lambda heartbeat: Path(sys.argv[2], "began").touch()
launcher.run(plan, threading.Event(), began)
"""

OTHER = os.getpid()
"""A process that is no trial's: this one."""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nvml(tmp_path_factory.mktemp("nvml"))


@contextmanager
def running(
    program: str, gpus: Sequence[PretendedGpu], folder: Path, libraries: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a trial on the first two of the GPUs; yield its launcher's process after its first heartbeat."""
    machine = folder.with_suffix(".gpus")
    write_machine(machine, gpus)
    folder.mkdir()
    launcher = subprocess.Popen(
        [sys.executable, "-c", RUN, program, str(folder)], env=environment(machine, libraries)
    )
    try:
        while launcher.poll() is None and not (folder / "began").exists():
            pass
        yield launcher
        assert launcher.wait(100) == 0
    finally:
        launcher.kill()
        launcher.wait()


def result_of(folder: Path) -> TrialResult:
    return read_json(TrialResult, TrialFolder(folder).result)


def test_an_out_of_memory_beside_somebody_elses_process_does_not_count(
    tmp_path: Path, libraries: Path
) -> None:
    busy = replace(H100, number=1, used_mib=20_480, processes={OTHER: 20_400})
    folder = tmp_path / "t0000"
    with running("runs_out_of_memory_in_build", (H100, busy, B200), folder, libraries):
        pass
    result = result_of(folder)
    assert (result.outcome, result.is_too_large) == (Outcome.OOM, False)
    assert result.occupied_gpus == (f"others held 19.92 GiB of GPU 1 (processes: {OTHER})",)
    assert result.reason.startswith("others held 19.92 GiB of GPU 1")


def test_an_out_of_memory_on_gpus_of_our_own_counts(tmp_path: Path, libraries: Path) -> None:
    elsewhere = replace(H100, number=2, used_mib=70_000, processes={OTHER: 69_000})
    folder = tmp_path / "t0000"
    with running(
        "runs_out_of_memory_in_build", (H100, replace(H100, number=1), elsewhere), folder, libraries
    ):
        pass
    result = result_of(folder)
    assert (result.outcome, result.occupied_gpus, result.is_too_large) == (Outcome.OOM, (), True)


def test_a_process_that_grows_beside_a_trial_does_not_discard_it(tmp_path: Path, libraries: Path) -> None:
    busy = replace(H100, number=1, used_mib=1_024, processes={OTHER: 1_000})
    folder = tmp_path / "t0000"
    with running("completes", (H100, busy), folder, libraries):
        write_machine(
            folder.with_suffix(".gpus"), (H100, replace(busy, used_mib=9_000, processes={OTHER: 8_976}))
        )
    result = result_of(folder)
    assert result.outcome is Outcome.COMPLETED, result.reason
    assert result.durations.total_s < 30.0, "there was nothing to wait for"
