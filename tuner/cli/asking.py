"""Sends the requests of the commands stop, pause and resume to the tuner of a sweep, and prints what it did."""

import time
from typing import Final

from tuner.cli.common import stdout
from tuner.errors import InputError
from tuner.sweep.folder import SweepFolder
from tuner.sweep.lock import Holder, holder_of
from tuner.sweep.requests import Wish, ask
from tuner.sweep.status import Status, read_status

_ANSWER_S: Final = 30.0
"""How long a tuner may take to answer: it looks several times a second, except while it learns from a trial."""
_POLL_S: Final = 0.1


def ask_tuner(folder: SweepFolder, wish: Wish) -> None:
    """Ask the tuner that holds a results folder, wait until it has done so, and print what it did.

    Raises:
        InputError: if no tuner runs the sweep, or the tuner does not answer.
    """
    holder = holder_of(folder.lock)
    if holder is None:
        raise InputError(
            f"{folder.path}: no megatune runs this sweep, so there is nothing to {wish.split('_')[0]}; "
            "`megatune sweep` starts it or goes on with it"
        )
    before = read_status(folder)
    request = ask(folder, wish)
    status = _answer(folder, holder, request.id)
    if status is None:
        folder.request.unlink(missing_ok=True)
        raise InputError(
            f"{folder.path}: the tuner ({holder}) has not answered within {_ANSWER_S:g} s; the request is withdrawn"
        )
    _tell(folder, holder, wish, status, before)


def _tell(folder: SweepFolder, holder: Holder, wish: Wish, status: Status, before: Status | None) -> None:
    """Print what the tuner did.

    Args:
        folder: The sweep's folder.
        holder: The tuner.
        wish: What it was asked for.
        status: Its status after it took the request.
        before: Its status before that; None if it had none.
    """
    running = _running(status)
    if wish == "pause":
        ending = f"; {running} still runs to its end" if running else ""
        stdout.print(f"paused{ending}; `megatune resume {folder.path}` goes on", markup=False, soft_wrap=True)
    elif wish == "resume":
        stdout.print(f"going on ({holder})", markup=False, soft_wrap=True)
    else:
        # A trial may have ended before the status was read.
        if running := running or (_running(before) if before else ""):
            doing = "waiting for" if wish == "stop_after_this_trial" else "ending"
            stdout.print(f"{doing} {running}", markup=False, soft_wrap=True)
        while holder_of(folder.lock) is not None:
            time.sleep(_POLL_S)
        ended = read_status(folder)
        finished = status.finished if ended is None else ended.finished
        stdout.print(
            f"stopped after {finished} finished trials; everything measured is kept, and the same "
            "`megatune sweep` command goes on",
            markup=False,
            soft_wrap=True,
        )


def _running(status: Status) -> str:
    return ", ".join(f"trial {trial.number} ({trial.label})" for trial in status.running)


def _answer(folder: SweepFolder, holder: Holder, request: str) -> Status | None:
    """Return the status that names the request (by its id) as taken; None if the tuner does not answer in time."""
    deadline_s = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline_s:
        status = read_status(folder)
        if status is not None and status.request_taken == request:
            return status
        if holder_of(folder.lock) != holder:
            raise InputError(f"{folder.path}: the sweep ended by itself before it took the request")
        time.sleep(_POLL_S)
    return None
