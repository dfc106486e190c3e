"""Short real calibrations of this machine under torchrun."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.machine import calibrate, quiet
from launchers.processes import marked_processes
from launchers.programs.calibration.collectives import CALLS, group_sizes, groups_of
from search_spaces.loader import load_cluster
from tuner.cli.app import run
from tuner.core.cluster import Cluster
from tuner.errors import MegatuneError
from tuner.files import read_json
from tuner.predict.calibration import Calibration, CalibrationPlan

PAIR = replace(load_cluster("cpu-4"), name="pair", gpus_per_node=2, nvlink_domain_gpus=2)
full_plan = calibrate.plan_for


def short_plan(cluster: Cluster) -> CalibrationPlan:
    return replace(
        full_plan(cluster),
        gemm_sizes=(16, 256),
        copy_bytes=(1024, 4 << 20),
        message_bytes=(1024, 32 << 20),
        passes=1,
        batch_s=0.005,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache for one test; after the test, no process of a calibration may run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "plan_for", short_plan)
    monkeypatch.setattr(quiet, "PATIENCE_S", 0.0)
    yield tmp_path / "megatune" / "calibrations"
    assert marked_processes(str(tmp_path)) == []


@pytest.mark.parametrize("strided", [False, True])
def test_groups_of_any_size_hold_every_rank_once(strided: bool) -> None:
    assert group_sizes(1) == ()
    assert group_sizes(6) == (2, 3, 6)
    for ranks in group_sizes(12):
        groups = groups_of(12, ranks, strided)
        assert {len(members) for members in groups} == {ranks}
        assert sorted(rank for members in groups for rank in members) == list(range(12))
    assert groups_of(4, 2, strided) == ([[0, 2], [1, 3]] if strided else [[0, 1], [2, 3]])


def test_a_torn_calibration_is_measured_again_and_the_new_one_is_kept(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = calibrate.cache_path(short_plan(PAIR).machine)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "name: night\n"
        "workload: {model: tiny-gpt, seq_length: 128, global_batch_size: 8, precision: fp32}\n"
        "cluster: {name: cpu-4, gpus_per_node: 2}\n"
    )
    assert run(["calibrate", str(sweep)]) == 0
    said = capsys.readouterr()
    assert "measuring again" in said.err and f"{path}: is not JSON" in said.err
    assert "all_reduce" in said.out and "0.05" in said.out
    assert list(cache.iterdir()) == [path]
    first = read_json(Calibration, path)
    _check(first)

    assert run(["calibrate", str(sweep), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cached"] and printed["path"] == str(path)
    assert printed["calibration"]["host_us"] == first.host_us
    assert calibrate.load_calibration(PAIR) == first


def _check(calibration: Calibration) -> None:
    """Assert that everything was measured, and that more work takes longer."""
    assert calibration.machine == short_plan(PAIR).machine
    assert calibration.gemm.keys() == {"fp32"}
    for times in (calibration.copy, *calibration.gemm.values(), *calibration.collectives.values()):
        assert times.ms[-1] > times.ms[0] > 0
    for tables in (calibration.collectives, calibration.strided_collectives):
        assert tables.keys() == CALLS.keys()
        assert all(times.sizes == ((2,), (1024, 32 << 20)) for times in tables.values())
    assert 1 < calibration.host_us < 10_000


def test_a_failing_calibration_says_why_and_keeps_its_output(cache: Path) -> None:
    plan = replace(short_plan(PAIR), precisions=("mxfp8",))
    with pytest.raises(MegatuneError, match=r"failed: rank \d: KeyError: 'mxfp8'") as failed:
        calibrate.calibrate(plan, threading.Event())
    (folder,) = cache.iterdir()
    assert str(folder) in str(failed.value)
    assert list((folder / "log").rglob("stderr.log"))


def test_a_calibration_that_takes_too_long_is_ended(cache: Path) -> None:
    with pytest.raises(MegatuneError, match=r"did not end within 2 s"):
        calibrate.calibrate(short_plan(PAIR), threading.Event(), limit_s=2)
    assert not calibrate.cache_path(short_plan(PAIR).machine).exists()


def test_a_calibration_ends_on_request_and_keeps_nothing(cache: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(short_plan(PAIR), stop)
    assert list(cache.iterdir()) == []


def test_a_calibration_on_a_busy_machine_says_so_and_records_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "PATIENCE_S", 1.0)
    monkeypatch.setattr("tuner.cli.calibrate.load_cluster", lambda name: PAIR)
    # They must not be our descendants, whose load counts as our own.
    start = (
        "import subprocess as s, sys; "
        "print(s.Popen([sys.executable, '-c', 'while True: pass'], stdout=s.DEVNULL).pid)"
    )
    burners = [
        int(subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, check=True).stdout)
        for _ in os.sched_getaffinity(0)
    ]
    try:
        assert run(["calibrate", "pair", "--json"]) == 0
        out, err = capsys.readouterr()
        assert "cores busy: waiting up to 1 s for them" in err and "measuring nevertheless" in err
        assert "disturbed: other processes kept" in err and "--force" in err
        kept = json.loads(out)["calibration"]["suspicions"]
        assert (
            len(kept) == 1
            and kept[0].startswith("other processes kept")
            and "during the calibration" in kept[0]
        )
        # It says so as long as it is used.
        assert run(["calibrate", "pair"]) == 0
        assert "disturbed: other processes kept" in capsys.readouterr().err
    finally:
        for burner in burners:
            os.kill(burner, signal.SIGKILL)
