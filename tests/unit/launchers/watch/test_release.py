"""A GPU that a job has not given back is told from one that others use, and both from one of which nobody knows."""

import os
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from launchers.watch import ownership, release
from launchers.watch.gpus import GpuProcess, GpuUse, pids_of
from launchers.watch.ownership import OwnProcesses
from launchers.watch.release import TOLERANCE_GIB, GpusAfter, occupied, wait_for_release

HERE = os.getppid()
"""A process that runs, and that is neither a trial's nor the tuner."""
NOWHERE = 2**22 + 1
"""The id of no process: above the kernel's largest."""

Uses = tuple[GpuUse, ...]


def gpu(
    used_gib: float | None, *processes: tuple[int, float | None], name: str = "0", fault: str = ""
) -> GpuUse:
    named = tuple(GpuProcess(*process) for process in processes)
    return GpuUse(name=name, used_gib=used_gib, total_gib=80.0, processes=named, fault=fault)


IDLE = (gpu(0.1), gpu(0.1, name="1"))


@pytest.fixture(autouse=True)
def in_no_container(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from sees_all(monkeypatch, True)


@pytest.fixture
def in_a_container(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from sees_all(monkeypatch, False)


def sees_all(monkeypatch: pytest.MonkeyPatch, answer: bool) -> Iterator[None]:
    for module in (ownership, release):
        monkeypatch.setattr(module, "sees_all_processes", lambda: answer)
    yield


def after(before: Uses, *looks: Uses | None) -> GpusAfter:
    """Return the GPUs after a job; NVML's answers are `looks`, the last of which it repeats."""
    answers = chain(looks, repeat(looks[-1]))
    return wait_for_release(before, lambda: next(answers), OwnProcesses(Path("/t0"), pids_of(before)), 0.0)


def test_a_gpu_that_is_given_back_late_is_waited_for() -> None:
    full = (gpu(60.0, (NOWHERE, 59.0)), IDLE[1])
    looks = iter((full, full, IDLE))
    result = wait_for_release(IDLE, lambda: next(looks), OwnProcesses(Path("/t0")), 60.0)
    assert result == GpusAfter(uses=IDLE)


@pytest.mark.parametrize("grown_gib", [-5.0, 0.0, TOLERANCE_GIB - 0.01])
def test_memory_held_before_the_trial_is_not_the_trials(grown_gib: float) -> None:
    before = (gpu(20.0, (77, 19.0)),)
    assert after(before, (gpu(20.0 + grown_gib, (77, 19.0)),)).held == ()


def test_memory_that_an_ended_process_still_holds_is_reported_with_its_figures() -> None:
    (line,) = after(IDLE, (gpu(13.5, (NOWHERE, 13.0)), IDLE[1])).held
    assert line == f"GPU 0 holds 13.50 GiB, 0.10 GiB before the trial (processes: {NOWHERE})"


def test_memory_that_no_process_holds_is_reported_too() -> None:
    (line,) = after(IDLE, (IDLE[0], gpu(2.0, name="1"))).held
    assert "GPU 1 holds 2.00 GiB" in line and "none that the driver names" in line


@pytest.mark.parametrize(
    "now",
    [
        (gpu(21.0, (77, 20.0)), gpu(0.1, name="1")),
        (gpu(20.0, (77, 19.0)), gpu(30.0, (HERE, 29.8), name="1")),
        (gpu(25.0, (77, 19.0), (HERE, 4.9)), gpu(0.1, name="1")),
        (gpu(25.0, (77, None)), gpu(0.1, name="1")),
    ],
    ids=["grows", "starts elsewhere", "starts beside", "does not say how much"],
)
def test_a_process_of_somebody_else_does_not_discard_the_trial(now: Uses) -> None:
    before = (gpu(20.0, (77, 19.0)), gpu(0.1, name="1"))
    assert after(before, now) == GpusAfter(uses=now)


def test_our_own_memory_is_found_behind_that_of_others() -> None:
    (line,) = after((gpu(20.0, (77, 19.0)),), (gpu(31.0, (77, 25.0), (NOWHERE, 5.0)),)).held
    assert "GPU 0 holds 31.00 GiB" in line


@pytest.mark.usefixtures("in_a_container")
def test_in_a_container_a_process_that_was_there_before_is_still_known() -> None:
    before, now = (gpu(20.0, (77, 19.0)),), (gpu(40.0, (77, 39.0)),)
    assert after(before, now) == GpusAfter(uses=now)


@pytest.mark.usefixtures("in_a_container")
def test_in_a_container_a_new_process_may_be_anybodys() -> None:
    result = after((gpu(0.1),), (gpu(30.0, (HERE, 29.0)),))
    assert result.held == ()
    (line,) = result.unclear
    assert "GPU 0 holds 30.00 GiB" in line


@pytest.mark.usefixtures("in_a_container")
def test_in_a_container_a_lost_gpu_is_still_lost() -> None:
    result = after(IDLE, (gpu(None, fault="GPU is lost"), gpu(9.0, name="1")))
    assert result.held == ("GPU 0 no longer answers (GPU is lost)",)
    assert len(result.unclear) == 1


def test_a_gpu_that_is_lost_is_named() -> None:
    assert after(IDLE, (IDLE[0], gpu(None, name="1", fault="GPU is lost"))).held == (
        "GPU 1 no longer answers (GPU is lost)",
    )
    assert after(IDLE, ()).held == ("NVML finds no driver any more",)


def test_a_gpu_that_never_answered_is_not_lost() -> None:
    hidden = (gpu(None, fault="Insufficient Permissions"),)
    assert after(hidden, hidden) == GpusAfter(uses=hidden)


def test_a_driver_that_does_not_answer_discards_no_trial(caplog: pytest.LogCaptureFixture) -> None:
    assert after(IDLE, None) == GpusAfter()
    assert "NVML does not answer" in caplog.text
    assert after((), None) == GpusAfter(), "nothing was known before the trial either"


def test_a_driver_that_answers_again_is_believed() -> None:
    looks = iter((None, IDLE))
    result = wait_for_release(IDLE, lambda: next(looks), OwnProcesses(Path("/t0")), 60.0)
    assert result == GpusAfter(uses=IDLE)


@pytest.mark.parametrize(
    ("before", "now", "others_gib", "lines"),
    [
        (IDLE, IDLE, (), 0),
        (IDLE, (), (0.0, 0.0), 0),
        ((gpu(20.0, (77, 19.5)),), IDLE[:1], (), 1),
        (IDLE[:1], (gpu(20.0, (77, 19.5)),), (), 1),
        (IDLE, IDLE, (0.0, 5.0), 1),
        ((gpu(0.7),), (gpu(0.7),), (0.3,), 0),
        ((gpu(None, fault="Insufficient Permissions"),), (), (), 0),
    ],
    ids=["idle", "unknown after", "before", "after", "during", "a display", "a GPU that says nothing"],
)
def test_a_gpu_is_occupied_if_others_held_a_hundredth_of_it_at_any_time(
    before: Uses, now: Uses, others_gib: tuple[float, ...], lines: int
) -> None:
    assert len(occupied(before, now, others_gib)) == lines


def test_an_occupied_gpu_is_named_with_its_memory_and_its_processes() -> None:
    (line,) = occupied((gpu(20.0, (77, 19.5)),), (gpu(25.0, (77, 19.5), (78, 5.0)),), ())
    assert line == "others held 25.00 GiB of GPU 0 (processes: 77, 78)"


def test_what_an_old_driver_keeps_for_itself_occupies_nothing() -> None:
    old = GpuUse(name="0", used_gib=1.6, total_gib=80.0, counts_reserve=True)
    assert occupied((old,), (), ()) == ()
