"""The deadline of a sweep: what the user gave, and the instant that it stands for, which the results folder keeps."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo
from typing import ClassVar

from pydantic import ConfigDict

from tuner.errors import InputError
from tuner.files import STRICT
from tuner.printable import OneLine


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptDeadline:
    """The time by which the last trial of a sweep should have ended, as `deadline.json` records it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    asked: OneLine
    """The text of `--deadline`. The same text given again means the same instant."""
    at: OneLine
    """The instant that the text stood for when it was first given: ISO 8601 with its offset from UTC."""

    def __post_init__(self) -> None:
        """Refuse an instant that is none; raises ValueError."""
        if datetime.fromisoformat(self.at).tzinfo is None:
            raise ValueError(f"at is '{self.at}', without an offset from UTC as in 2026-03-01T07:00:00+00:00")

    @property
    def instant(self) -> datetime:
        """The instant, in the zone that it was given in."""
        return datetime.fromisoformat(self.at)

    def has_passed(self, now: datetime) -> bool:
        """Whether the deadline has passed."""
        return self.instant <= now

    def __str__(self) -> str:
        return self.instant.isoformat(sep=" ", timespec="minutes")


def chosen_deadline(
    asked: str | None, kept: KeptDeadline | None, now: datetime, zone: tzinfo | None = None
) -> KeptDeadline | None:
    """Return the deadline that holds: the kept one, unless the user gives another; None if there is neither.

    Args:
        asked: the text of `--deadline`; None if it is not given.
        kept: the deadline of the sweep so far.
        now: the time now, with its offset.
        zone: the zone of a text that names none; None is this machine's zone.

    Raises:
        InputError: if another text is given that is no deadline, or that has passed.
    """
    if asked is None or (kept is not None and asked == kept.asked):
        return kept
    return KeptDeadline(asked=asked, at=_instant(asked, now, zone).isoformat(timespec="seconds"))


def next_day(deadline: KeptDeadline, now: datetime, zone: tzinfo | None = None) -> str:
    """Return the text of a deadline at the same time of day as another one, the first after `now`."""
    wall = deadline.instant.astimezone(zone)
    return f"{_instant(f'{wall:%H:%M}', now, zone):%Y-%m-%dT%H:%M}"


def _instant(text: str, now: datetime, zone: tzinfo | None) -> datetime:
    """Return the first instant after `now` that a text stands for.

    Args:
        text: a time of day as `07:00`, or an ISO date and time.
        now: the time now, with its offset.
        zone: the zone of a text that names none; None is this machine's zone.

    Raises:
        InputError: if the text is neither, or its date and time have passed.
    """
    # Dates at the ends of the calendar have no instant in some zones.
    with suppress(ValueError, OverflowError):
        for wall in _wall_clocks(text, now.astimezone(zone)):
            # An hour that occurs twice has the instant of fold 0, then the one of fold 1. For an hour that is skipped,
            # the instant of fold 0 is as long after the last hour as the text says.
            for fold in (0, 1):
                local = wall if wall.tzinfo else wall.replace(tzinfo=zone, fold=fold)
                if (instant := local.astimezone(UTC)) > now:
                    return instant.astimezone(zone)
        raise InputError(f"--deadline {text}: has passed, it is {now.astimezone(zone):%Y-%m-%dT%H:%M}")
    raise InputError(
        f"--deadline {text}: is neither a time of day as 07:00 nor a date and time as 2026-03-01T07:00"
    )


def _wall_clocks(text: str, now: datetime) -> list[datetime]:
    """Return the dates and times that a text may mean, in order; raises ValueError."""
    with suppress(ValueError):
        time_of_day = time.fromisoformat(text)
        if time_of_day.tzinfo is None:
            return [datetime.combine(now.date() + timedelta(days=days), time_of_day) for days in range(2)]
    return [datetime.fromisoformat(text)]
