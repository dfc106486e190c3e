"""Which trials the refinement of a search is centred on, as the trials themselves record it."""

from collections.abc import Sequence

from tuner.trial.finished import FinishedTrial, TrialSource


def refinement_centres(sources: Sequence[TrialSource | FinishedTrial]) -> tuple[int, ...]:
    """Return the numbers of the trials whose layouts the refinement varies; empty while the search is in its grid.

    Args:
        sources: the sources of all trials of a sweep, or the trials themselves, by number.
    """
    return next((source.around for source in reversed(sources) if source.around), ())


def refinement_sentence(trials: Sequence[FinishedTrial]) -> str | None:
    """Return a sentence that says where the refinement began and what its centres are; None if there was none."""
    refining = sorted(trial.number for trial in trials if trial.around)
    if not refining:
        return None
    centres = ", ".join(f"t{number:04d}" for number in refinement_centres(trials))
    return f"From t{refining[0]:04d} on, the refinement varied the other knobs around the best of the grid: {centres}."
