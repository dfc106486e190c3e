"""Ctrl-C and SIGTERM set an event that asks to stop, instead of raising an exception at any place."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tuner.cli.common import stderr


@contextmanager
def stop_on_signals(
    message: str = "ending the running trial; everything measured is kept",
) -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set, and restore the previous handlers at the end.

    A second signal changes nothing, since the end of a trial takes seconds.

    Args:
        message: what happens now, for the message on stderr.
    """
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stderr.print(f"{signal.Signals(number).name}: {message}")
        stop.set()

    previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
