"""Standard output and standard error of the commands: what cannot be printed is lost, and ends nothing."""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STANDARD: Final = (0, 1, 2)
"""The descriptors of standard input, output and error."""


class _Output(io.FileIO):
    """The bytes of a standard stream, of which some may be lost.

    Args:
        descriptor: The stream's descriptor; it stays open.
        must_arrive: Raise the first error that is not a reader who went away. Without it no write raises.
    """

    def __init__(self, descriptor: int, *, must_arrive: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._must_arrive = must_arrive

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write data; return the number of bytes that are written or lost."""
        whole = memoryview(data).nbytes
        try:
            written: int | None = super().write(data)
        except OSError as error:
            if self._must_arrive and error.errno != errno.EPIPE:
                # Whoever catches the error says so; what is left in the buffers is then lost.
                self._must_arrive = False
                raise
            return whole
        # A reader that does not wait, and is not ready, makes it None.
        return whole if written is None else written


def use_lasting_streams(*, stdout_must_arrive: bool) -> None:
    """Replace `sys.stdout` and `sys.stderr`, so that a closed, broken or full one does not end the command.

    A reader that goes away, as in `| head`, is no error on any stream. A closed standard descriptor is opened on
    /dev/null, since the next file to be opened would take its place and get what is printed.

    Args:
        stdout_must_arrive: Whether any other failure to write standard output is still an error.
    """
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the kernel gives the lowest descriptor that is free: this one
    sys.stdout = _lasting(sys.stdout, 1, must_arrive=stdout_must_arrive)
    sys.stderr = _lasting(sys.stderr, 2, must_arrive=False)


def _lasting(stream: TextIO | None, descriptor: int, *, must_arrive: bool) -> TextIO:
    """Return a stream that writes to the descriptor as `stream` does, but loses what cannot be written."""
    # Python has no stream for a descriptor that was closed when it started.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    errors = getattr(stream, "errors", None) if must_arrive else "backslashreplace"
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, must_arrive=must_arrive)),
        encoding=encoding,
        errors=errors,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )
