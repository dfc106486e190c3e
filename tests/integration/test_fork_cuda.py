"""CUDA stays usable in forked ranks: nothing that runs before the fork asks for it. No GPU is needed."""

import logging
import os
import time
from pathlib import Path

import pytest

from launchers.local import fork_client
from launchers.local.fork_client import Preload
from launchers.processes import MARKER, RunningJob, inherited_environment, loopback_torchrun, python_path

PROGRAMS = "tests.integration.programs"


def start(preload: Preload, folder: Path) -> RunningJob:
    argv = (*loopback_torchrun(2, "trial", folder / "log"), "-m", f"{PROGRAMS}.asks_for_cuda")
    env = {**inherited_environment(), MARKER: str(folder), "ASKED": str(folder / "asked")}
    return preload.start(
        argv, env | {"PYTHONPATH": os.pathsep.join(python_path())}, folder, folder / "output.log"
    )


def finish(job: RunningJob) -> int | None:
    deadline_s = time.monotonic() + 120
    while not job.ended() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert job.end(grace_s=1.0) == ()
    return job.exit_code


def ranks(folder: Path) -> set[int]:
    return {int((folder / f"rank{rank}").read_text()) for rank in (0, 1)}


def test_only_the_ranks_ask_torch_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_client, "IMPORTED", {f"{PROGRAMS}.asks_for_cuda": f"{PROGRAMS}.asks_for_cuda"})
    with Preload(tmp_path) as preload:
        assert finish(start(preload, tmp_path)) == 0, (tmp_path / "output.log").read_text()
    assert {int(pid) for pid in (tmp_path / "asked").read_text().split()} == ranks(tmp_path)


def test_trials_start_cold_once_an_import_has_used_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fork_client, "IMPORTED", {f"{PROGRAMS}.asks_for_cuda": f"{PROGRAMS}.uses_cuda"})
    folders = [tmp_path / "first", tmp_path / "second"]
    with caplog.at_level(logging.WARNING), Preload(tmp_path) as preload:
        for folder in folders:
            folder.mkdir()
            assert finish(start(preload, folder)) == 0, (folder / "output.log").read_text()
            assert len(ranks(folder)) == 2
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        f"{PROGRAMS}.asks_for_cuda uses CUDA while it is imported"
    ]
