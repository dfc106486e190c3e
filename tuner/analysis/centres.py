"""Reads from the trials' records which trials are the centres of a sweep's refinement."""

from collections.abc import Sequence

from tuner.trial.finished import FinishedTrial, TrialSource


def refinement_centres(sources: Sequence[TrialSource | FinishedTrial]) -> tuple[int, ...]:
    """Return the numbers of the trials around whose layouts the refinement searches; empty before the refinement.

    Args:
        sources: the sources of all trials of a sweep, or the trials themselves, in order of their numbers.
    """
    return next((source.around for source in reversed(sources) if source.around), ())


def refinement_sentence(trials: Sequence[FinishedTrial]) -> str | None:
    """Return a sentence that names the refinement's first trial and its centres; None if there was no refinement."""
    refining = sorted(trial.number for trial in trials if trial.around)
    if not refining:
        return None
    centres = ", ".join(f"t{number:04d}" for number in refinement_centres(trials))
    return f"From t{refining[0]:04d} on, the refinement varied the other knobs around the best of the grid: {centres}."
