"""Requests to a running tuner, through a file in its results folder.

The command writes request.json; the tuner takes it within a second, removes it, and names its id in status.json.
"""

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT, read_json, write_json
from tuner.sweep.folder import SweepFolder
from tuner.sweep.state import Halt

Wish = Literal["stop", "stop_after_this_trial", "pause", "resume"]

_HALT: Final[dict[Wish, Halt]] = {
    "stop": Halt.STOPPING,
    "stop_after_this_trial": Halt.CLOSING,
    "pause": Halt.PAUSED,
    "resume": Halt.NONE,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRequest:
    """One request: the content of `request.json`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    wish: Wish
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    asked_s: float = field(default_factory=time.time)
    """When the request was made, in seconds since the epoch."""

    @property
    def halt(self) -> Halt:
        """The halt that the wish asks for."""
        return _HALT[self.wish]


def ask(folder: SweepFolder, wish: Wish) -> SweepRequest:
    """Write a request for the tuner that holds the folder; an earlier request that was not taken yet is replaced."""
    request = SweepRequest(wish=wish)
    write_json(folder.request, request)
    return request


def take_request(folder: SweepFolder) -> SweepRequest | None:
    """Read and remove the request, if there is one; a file that cannot be read is removed.

    A request that cannot be removed is not taken, or it would be taken again and again.
    """
    request = None
    try:
        if folder.request.exists():
            with suppress(InputError):
                request = read_json(SweepRequest, folder.request)
            folder.request.unlink()
    except OSError:
        return None
    return request
