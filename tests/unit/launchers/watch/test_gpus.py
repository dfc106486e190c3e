"""A GPU that is fuller after a trial than before it is reported."""

import pytest

from launchers.watch.gpus import (
    TOLERANCE_GIB,
    GpuSelection,
    GpuUse,
    gpus_in_use,
    still_held,
    visible,
    wait_for_release,
)

BEFORE = (GpuUse("0", 1.0), GpuUse("1", 20.0, (77,)))


@pytest.mark.parametrize("grown_gib", [-5.0, 0.0, TOLERANCE_GIB])
def test_memory_held_before_the_trial_is_not_the_trials(grown_gib: float) -> None:
    now = (GpuUse("0", 1.0), GpuUse("1", 20.0 + grown_gib, (77,)))
    assert still_held(BEFORE, now) == ()


def test_a_fuller_gpu_is_named_with_its_figures_and_its_processes() -> None:
    (line,) = still_held(BEFORE, (GpuUse("0", 13.5, (4242, 4243)), GpuUse("1", 20.0, (77,))))
    assert line == "GPU 0 holds 13.50 GiB, 1.00 GiB before the trial (processes: 4242, 4243)"


def test_a_gpu_that_a_hidden_process_holds_is_reported_too() -> None:
    (line,) = still_held(BEFORE, (GpuUse("0", 2.0), GpuUse("1", 20.0)))
    assert "none that the driver names" in line


def test_a_gpu_that_is_lost_is_not_as_free_as_before() -> None:
    assert still_held(BEFORE, ()) == ("the driver answers for 0 GPUs, before the trial for 2",)


def test_the_wait_for_a_gpu_ends_after_its_time() -> None:
    # Every GPU is fuller than -1000 GiB, and a machine without a driver answers for none.
    assert wait_for_release(GpuSelection(1), (GpuUse("0", -1000.0),), limit_s=0.0) != ()


@pytest.mark.parametrize(
    ("selected", "names"),
    [(None, ["0", "1", "2"]), ("", []), ("2, 0", ["2", "0"]), ("GPU-8f2a", ["GPU-8f2a"])],
)
def test_only_the_gpus_that_a_job_sees_are_asked_for(selected: str | None, names: list[str]) -> None:
    assert visible(selected, 3) == names


def test_a_job_without_gpus_waits_for_none() -> None:
    assert gpus_in_use(GpuSelection(0)) == ()
    assert wait_for_release(GpuSelection(0), (), limit_s=0.0) == ()
