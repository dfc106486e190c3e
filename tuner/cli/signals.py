"""Ctrl-C and SIGTERM as a wish to stop, not as an exception somewhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tuner.cli.common import stderr


@contextmanager
def stop_on_signals(
    told: str = "ending the running trial; everything measured is kept",
) -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set; more of them change nothing, since ending a trial takes seconds."""
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stderr.print(f"{signal.Signals(number).name}: {told}")
        stop.set()

    previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
