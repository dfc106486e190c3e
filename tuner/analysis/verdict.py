"""Writes sentences for the user that say how far a sweep's answer can be trusted."""

from collections.abc import Mapping, Sequence

from tuner.analysis.answer import Answer, answer
from tuner.analysis.candidates import ruled_out
from tuner.analysis.centres import refinement_sentence
from tuner.analysis.drift import drift
from tuner.core.layout import Layout
from tuner.trial.finished import FinishedTrial


def verdict(trials: Sequence[FinishedTrial]) -> list[str]:
    """Return sentences that say how far the answer can be trusted, one per subject, for subjects that apply.

    The subjects are missing finals, ties, layouts that cannot win, losses that were not compared, the refinement, the
    machine's drift, repeats, and disturbed measurements.
    """
    ranked = answer(trials)
    if ranked is None:
        return _verdict_without_answer(trials)
    sentences = []
    if not ranked.is_final:
        sentences.append("The ranking rests on single measurements of the search, because no finals ran.")
    if len(ranked.tied) > 1:
        sentences.append(_tie_sentence(ranked))
    sentences += _out_sentences(ranked.out)
    if any(trial.routes_at_random for trial in trials):
        sentences.append(
            "Losses were not compared: with forced balance, every layout sends tokens to other experts at random."
        )
    if (refinement := refinement_sentence(trials)) is not None:
        sentences.append(refinement)
    if ranked.drift is not None:
        sentences.append(ranked.drift.sentence())
    repeats = sum(trial.source == "repeat" for trial in trials)
    if repeats:
        counted = "1 trial was" if repeats == 1 else f"{repeats} trials were"
        sentences.append(
            f"{counted} measured again, because the machine had disturbed the first measurement."
        )
    if ranked.doubts:
        more = f" ({len(ranked.doubts)} such lines)" if len(ranked.doubts) > 1 else ""
        sentences.append(
            f"The answer is less sure, because the machine was disturbed: {ranked.doubts[0]}{more}."
        )
    return sentences


def _verdict_without_answer(trials: Sequence[FinishedTrial]) -> list[str]:
    ordered = sorted(trials, key=lambda trial: trial.number)
    machine_drift = drift(ordered)
    return [*_out_sentences(ruled_out(ordered)), *([machine_drift.sentence()] if machine_drift else [])]


def _tie_sentence(ranked: Answer) -> str:
    best, *others = ranked.tied
    apart = max(max(other.over_best.high - 1, 1 - other.over_best.low) for other in others)
    names = ", ".join(
        f"{other.layout.label()} ({other.over_best.value - 1:+.1%}, {other.metrics.peak_allocated_gib:.3g} GiB)"
        for other in others
    )
    smallest = min(ranked.tied, key=lambda standing: standing.metrics.peak_allocated_gib)
    return (
        f"Tie within {apart:.1%}: noise cannot tell the best, {best.layout.label()}, from {names}; "
        f"of these, {smallest.layout.label()} takes the least memory."
    )


def _out_sentences(out: Mapping[Layout, str]) -> list[str]:
    return [f"Out: {layout.label()} {reason}." for layout, reason in out.items()]
