"""A measurement waits for other processes, but not for ever."""

import os
import threading
from collections.abc import Iterator

import pytest

from launchers.machine import quiet


def waited(monkeypatch: pytest.MonkeyPatch, loads: list[float], patience_s: float = 60.0) -> list[str]:
    """Return what is said while the foreign load takes these values, one per look; the last value stays."""
    values: Iterator[float] = iter(loads)
    said: list[str] = []
    monkeypatch.setattr(quiet, "PATIENCE_S", patience_s)
    monkeypatch.setattr(quiet, "foreign_load", lambda stop: next(values, loads[-1]))
    quiet.wait_for_quiet(threading.Event(), said.append)
    return said


def test_a_quiet_machine_is_measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(monkeypatch, [0.0]) == []


def test_a_busy_machine_is_waited_for_until_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    said = waited(monkeypatch, [1.5 * cores, 1.4 * cores, 0.0])
    assert said == [
        f"other processes keep {1.5 * cores:.1f} of {cores} cores busy: waiting up to 60 s for them"
    ]


def test_a_machine_that_stays_busy_is_measured_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    said = waited(monkeypatch, [float(cores)], patience_s=0.0)
    busy = f"other processes keep {cores:.1f} of {cores} cores busy"
    assert said == [f"{busy}: waiting up to 0 s for them", f"{busy}: measuring nevertheless"]


def test_a_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    quiet.wait_for_quiet(stop, lambda text: pytest.fail(text))


def test_the_load_of_this_process_is_not_foreign() -> None:
    stop = threading.Event()
    before_s = os.times().user
    burner = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    own = 0.0
    burner.start()
    try:
        load = quiet.foreign_load(threading.Event())
        own = os.times().user - before_s
    finally:
        stop.set()
        burner.join()
    assert own > 0.1 and load < len(os.sched_getaffinity(0)) - 0.3 * own
