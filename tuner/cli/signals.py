"""Ctrl-C, SIGTERM and SIGHUP set an event that asks to stop, instead of raising an exception at any place."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tuner.cli.common import stderr


@contextmanager
def stop_on_signals(
    message: str = "ending the running trial; everything measured is kept",
) -> Iterator[threading.Event]:
    """Give an event that SIGINT, SIGTERM and SIGHUP set, and restore the previous handlers at the end.

    A second signal changes nothing, since the end of a trial takes seconds. The end of a terminal or of an ssh session
    sends SIGHUP; it stays ignored if it was ignored before, as under `nohup`.

    Args:
        message: what happens now, for the message on stderr.
    """
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        is_first = not stop.is_set()
        stop.set()
        if is_first:
            # The signal may have come while this thread was writing to stderr, which Python then refuses to enter.
            with suppress(RuntimeError):
                stderr.print(f"{signal.Signals(number).name}: {message}")

    stopping = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stopping.append(signal.SIGHUP)
    previous = {number: signal.signal(number, ask_to_stop) for number in stopping}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
