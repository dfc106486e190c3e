"""A results folder belongs to one sweep and one machine, and refuses others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.replay import claim, sweep_of
from tests.trials import CLUSTER, MODEL, completed_row, write_trial
from tuner.errors import InputError
from tuner.files import to_data
from tuner.predict.calibration import Machine
from tuner.sweep.folder import SweepFolder


def test_a_folder_is_claimed_and_read_back(tmp_path: Path) -> None:
    folder, sweep = (
        SweepFolder(tmp_path / "a" / "night"),
        sweep_of(baseline={"tp": 2}, lift=["tp-inside-nvlink"]),
    )
    claim(folder, sweep)
    assert folder.sweep() == sweep
    assert folder.trials.is_dir()
    before = folder.identity.stat().st_mtime_ns
    claim(folder, sweep)
    assert folder.identity.stat().st_mtime_ns == before
    later = sweep_of(budget={"trials": 99}, knobs={"tp": [1]})
    claim(folder, later)
    assert folder.sweep() == later


@pytest.mark.parametrize(
    ("other", "lines"),
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
def test_the_error_names_every_difference_of_another_sweep(
    tmp_path: Path, other: object, lines: list[str]
) -> None:
    folder = SweepFolder(tmp_path)
    claim(folder, sweep_of())
    before = folder.identity.read_bytes()
    with pytest.raises(InputError) as caught:
        claim(folder, other)  # type: ignore[arg-type]  # a sweep: pytest's parameters have no type
    assert all(line in str(caught.value) for line in lines)
    assert folder.identity.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds the results of another sweep"), ("{}", "another")],
)
def test_a_damaged_sweep_json_is_not_overwritten(tmp_path: Path, text: str, message: str) -> None:
    folder = SweepFolder(tmp_path)
    folder.identity.write_text(text)
    with pytest.raises(InputError, match=message):
        claim(folder, sweep_of())
    assert folder.identity.read_text() == text
    with pytest.raises(InputError, match=r"sweep\.json"):
        folder.sweep()


MACHINE = Machine(
    device="cpu", name="EPYC", count=2, world_size=2, versions={"torch": "2.13.0", "megatron-core": "0.16.1"}
)


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        (
            replace(MACHINE, versions={"torch": "2.14.0", "transformer-engine": "2.1"}),
            [
                "machine.versions.torch was '2.13.0', is now '2.14.0'",
                "machine.versions.megatron-core was '0.16.1', is now None",
                "machine.versions.transformer-engine was None, is now '2.1'",
            ],
        ),
        (replace(MACHINE, name="Xeon"), ["machine.name was 'EPYC', is now 'Xeon'"]),
    ],
)
def test_a_folder_with_trials_refuses_other_hardware_and_software(
    tmp_path: Path, other: Machine, lines: list[str]
) -> None:
    folder = SweepFolder(tmp_path)
    claim(folder, sweep_of(), replace(MACHINE, count=64))
    claim(folder, sweep_of(), MACHINE)  # nothing is measured yet
    write_trial(tmp_path, completed_row(0, 100.0))
    claim(folder, sweep_of(budget={"trials": 99}), MACHINE)
    before = folder.machine.read_bytes(), folder.identity.read_bytes()
    with pytest.raises(InputError) as caught:
        claim(folder, sweep_of(), other)
    assert all(line in str(caught.value) for line in lines)
    assert "name, or another folder with --results" in str(caught.value)
    assert (folder.machine.read_bytes(), folder.identity.read_bytes()) == before


def test_a_folder_without_a_machine_takes_that_of_its_next_tuner(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    claim(folder, sweep_of())
    write_trial(tmp_path, completed_row(0, 100.0))
    claim(folder, sweep_of(), MACHINE)
    with pytest.raises(InputError, match="other hardware or software"):
        claim(folder, sweep_of(), replace(MACHINE, count=3))


@pytest.mark.parametrize(
    "keys",
    [
        {"budget": {"trials": 99, "hours": 1.0, "min_gain": 0.5}},
        {"limits": {"trial_s": 5.0}},
        {"measurement": {"max_steps": 99}},
        {"knobs": {"tp": [1, 2], "cp": [1, 2]}},
        {"sampler": "random"},
        {"tracking": {"experiment": "other"}},
        {"baseline": {"tp": 4}},
        {"lift": ["tp-inside-nvlink"]},
    ],
)
def test_keys_that_leave_measurements_comparable_may_change(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = SweepFolder(tmp_path)
    claim(folder, sweep_of())
    changed = sweep_of(**keys)
    assert changed != sweep_of()
    claim(folder, changed)
    assert folder.sweep() == changed


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no sweep \(no sweep\.json\)"):
        SweepFolder(tmp_path).sweep()


def test_a_folder_below_a_file_cannot_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the results folder cannot be written: Not a directory"):
        claim(SweepFolder(tmp_path / "file" / "night"), sweep_of())


@pytest.mark.parametrize("name", ["a?b", "100%", "{a}"])
def test_a_path_that_sqlite_cannot_take_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match="which the URI of a SQLite file cannot"):
        claim(SweepFolder(tmp_path / name), sweep_of())
    assert not list(tmp_path.iterdir())


def test_sweep_json_keeps_the_order_of_a_knobs_values(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    claim(folder, sweep_of(knobs={"tp": [4, 1, 2]}))
    assert json.loads(folder.identity.read_text())["domain"]["tp"] == [4, 1, 2]
    assert folder.sweep().domain["tp"] == (4, 1, 2)
