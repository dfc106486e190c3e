"""Which trials the refinement of a search varies, as the trials themselves record it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.trial.finished import FinishedTrial, TrialSource

if TYPE_CHECKING:
    pass


def refinement_centres(sources: Sequence[TrialSource | FinishedTrial]) -> tuple[int, ...]:
    """The trials that the second stage varies, as the trials of a sweep say it; empty in the first.

    Args:
        sources: of all trials, or the trials themselves, by number.
    """
    return next((one.around for one in reversed(sources) if one.around), ())


def refinement_sentence(rows: Sequence[FinishedTrial]) -> str | None:
    """Where the second stage began and what it lies around; None where there was none."""
    second = sorted(row.number for row in rows if row.around)
    if not second:
        return None
    names = ", ".join(f"t{number:04d}" for number in refinement_centres(rows))
    return f"From t{second[0]:04d} on a second stage varied the other knobs around the best of the first: {names}."
