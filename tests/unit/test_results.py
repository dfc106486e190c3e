"""A results folder belongs to one sweep, and says so."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.replay import sweep_of
from tests.trials import CLUSTER, MODEL
from tuner.errors import InputError
from tuner.files import to_data
from tuner.results import SweepFolder


def test_a_folder_is_claimed_and_read_back(tmp_path: Path) -> None:
    folder, sweep = (
        SweepFolder(tmp_path / "a" / "night"),
        sweep_of(baseline={"tp": 2}, lift=["tp-inside-nvlink"]),
    )
    folder.claim(sweep)
    assert folder.sweep() == sweep
    assert folder.trials.is_dir()
    before = folder.identity.stat().st_mtime_ns
    folder.claim(sweep)
    assert folder.identity.stat().st_mtime_ns == before
    later = sweep_of(budget={"trials": 99}, knobs={"tp": [1]})
    folder.claim(later)
    assert folder.sweep() == later


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (sweep_of(seed=1), ["seed was 1234, is now 1"]),
        (
            sweep_of(replace(CLUSTER, gpus_per_node=4, name="half")),
            ["cluster.gpus_per_node was 8, is now 4", "cluster.name was 'test-cluster', is now 'half'"],
        ),
        (
            sweep_of(
                workload={
                    "model": to_data(replace(MODEL, num_layers=8)),
                    "seq_length": 64,
                    "global_batch_size": 16,
                }
            ),
            ["workload.model.num_layers was 4, is now 8", "workload.seq_length was 128, is now 64"],
        ),
    ],
)
def test_every_difference_of_another_sweep_is_named(tmp_path: Path, other: object, told: list[str]) -> None:
    folder = SweepFolder(tmp_path)
    folder.claim(sweep_of())
    before = folder.identity.read_bytes()
    with pytest.raises(InputError) as caught:
        folder.claim(other)  # type: ignore[arg-type]  # a sweep: pytest's parameters have no type
    assert all(line in str(caught.value) for line in told)
    assert folder.identity.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not JSON"), ("[]", "holds the results of another sweep"), ("{}", "another")]
)
def test_an_identity_that_is_damaged_is_not_overwritten(tmp_path: Path, text: str, told: str) -> None:
    folder = SweepFolder(tmp_path)
    folder.identity.write_text(text)
    with pytest.raises(InputError, match=told):
        folder.claim(sweep_of())
    assert folder.identity.read_text() == text
    with pytest.raises(InputError, match=r"sweep\.json"):
        folder.sweep()


def test_a_folder_without_a_sweep_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no sweep \(no sweep\.json\)"):
        SweepFolder(tmp_path).sweep()


def test_a_folder_below_a_file_cannot_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the results folder cannot be written: Not a directory"):
        SweepFolder(tmp_path / "file" / "night").claim(sweep_of())


@pytest.mark.parametrize("name", ["a?b", "100%", "{a}"])
def test_a_path_that_sqlite_cannot_take_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match="which the URI of a SQLite file cannot"):
        SweepFolder(tmp_path / name).claim(sweep_of())
    assert not list(tmp_path.iterdir())


def test_the_identity_keeps_the_order_of_what_is_searched(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.claim(sweep_of(knobs={"tp": [4, 1, 2]}))
    assert json.loads(folder.identity.read_text())["domain"]["tp"] == [4, 1, 2]
    assert folder.sweep().domain["tp"] == (4, 1, 2)


def _hold(path: Path, held: "multiprocessing.synchronize.Event") -> None:
    with SweepFolder(path).lock():
        held.set()
        signal.pause()


def test_the_lock_of_a_killed_tuner_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(InputError, match="another megatune is running this sweep"),
            SweepFolder(tmp_path).lock(),
        ):
            pass
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    with SweepFolder(tmp_path).lock():
        pass
