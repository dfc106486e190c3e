"""Starts the trials in flight, reports how they end, and stops them. Decides nothing."""

import threading
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Protocol, Self

from tuner.trial.contract import Heartbeat, TrialFolder, TrialResult, TrialSpec
from tuner.trial.launcher import WHOLE_MACHINE, Launcher, Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A running trial gave a sign of life."""

    number: int
    heartbeat: Heartbeat


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnded:
    """An attempt at a trial ended; its result is in the trial's folder."""

    number: int
    result: TrialResult


@dataclass(frozen=True, slots=True)
class _Crashed:
    """The launcher itself failed: a bug, or a killed tuner in a test."""

    error: BaseException


class Runner(Protocol):
    """Runs several trials at once."""

    @property
    def free_slots(self) -> int:
        """Trials that may be submitted now."""

    def submit(self, spec: TrialSpec, folder: TrialFolder) -> None:
        """Start an attempt at a trial; its events carry the spec's number.

        Raises:
            InputError: if the launcher cannot run the spec.
        """

    def next_event(self, patience_s: float) -> Beat | AttemptEnded | None:
        """Return the next event; None if none comes within `patience_s` seconds."""

    def stop_all(self) -> None:
        """End every running trial; each still gives an AttemptEnded, with the outcome `interrupted`."""


class ThreadRunner:
    """Runs each trial by a blocking call of a launcher, in a thread of its own.

    Args:
        launcher: Starts and ends the processes of trials; its `run` is called from several threads at once if there is
            more than one place.
        stop: Set by the caller or by `stop_all`: every running trial is then ended.
        places: Where trials may run, one at a time on each.
    """

    def __init__(
        self, launcher: Launcher, stop: threading.Event, places: tuple[Place, ...] = (WHOLE_MACHINE,)
    ) -> None:
        self._launcher, self._stop = launcher, stop
        self._free = list(places)
        self._events: SimpleQueue[Beat | AttemptEnded | _Crashed] = SimpleQueue()
        self._place_of: dict[int, Place] = {}
        self._threads: dict[int, threading.Thread] = {}

    @property
    def free_slots(self) -> int:
        """See Runner."""
        return len(self._free)

    def submit(self, spec: TrialSpec, folder: TrialFolder) -> None:
        """See Runner."""
        plan = self._launcher.plan(spec, folder, self._free[0])
        number = spec.number

        def run() -> None:
            try:
                result = self._launcher.run(
                    plan, self._stop, lambda beat: self._events.put(Beat(number=number, heartbeat=beat))
                )
            # `next_event` raises every error again in the controller's thread, where the user sees it.
            except BaseException as error:
                self._events.put(_Crashed(error))
            else:
                self._events.put(AttemptEnded(number=number, result=result))

        self._place_of[number] = self._free.pop(0)
        self._threads[number] = threading.Thread(target=run, name=f"trial {number}", daemon=True)
        self._threads[number].start()

    def next_event(self, patience_s: float) -> Beat | AttemptEnded | None:
        """See Runner. Raises what a launcher raised."""
        try:
            event = self._events.get(timeout=patience_s)
        except Empty:
            return None
        if isinstance(event, _Crashed):
            raise event.error
        if isinstance(event, AttemptEnded):
            self._free.append(self._place_of.pop(event.number))
            self._threads.pop(event.number).join()
        return event

    def stop_all(self) -> None:
        """See Runner."""
        self._stop.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the trials that still run: no process of a trial outlives the runner."""
        self.stop_all()
        for thread in self._threads.values():
            thread.join()
