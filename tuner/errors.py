"""Errors that a user acts on. The command line turns each one into a message and an exit code."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from tuner.printable import printable


class MegatuneError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(MegatuneError):
    """The user's input cannot be used. The message names the file and the key, and says what to do. Exit code 2."""

    exit_code = 2


class NothingFeasibleError(MegatuneError):
    """All trials ran, and none of them measured a layout. Exit code 3."""

    exit_code = 3


class CircuitBreakerError(MegatuneError):
    """The work stopped, because the machine fails, not the layouts. Exit code 4."""

    exit_code = 4


def machine_at_fault(error: OSError) -> str:
    """Return the message for an error that the operating system gave: what failed, and what to do."""
    place = "" if error.filename is None else f"{error.filename}: "
    return (
        f"{place}{error.strerror or error}: the machine or a file on it is at fault; mend that, and run the same "
        "command again (`megatune --debug ...` shows where it happened)"
    )


@contextmanager
def placed(place: Path) -> Iterator[None]:
    """Name a place in each error of the operating system that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(place)
        raise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
