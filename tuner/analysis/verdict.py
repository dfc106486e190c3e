"""What to believe of a sweep's answer, in sentences."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tuner.analysis.answer import Answer, answer, ruled_out
from tuner.analysis.centres import refinement_sentence
from tuner.analysis.drift import drift
from tuner.core.layout import Layout
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    pass


def verdict(rows: Sequence[FinishedTrial]) -> list[str]:
    """What to believe of the answer, a sentence each: ties, who is out, the machine's drift, what was disturbed."""
    found = answer(rows)
    told = []
    if found is None:
        known = drift(sorted(rows, key=lambda row: row.number))
        return [
            *_outs(ruled_out(sorted(rows, key=lambda row: row.number))),
            *([known.sentence()] if known else []),
        ]
    if not found.is_final:
        told.append("By single measurements of the search: no finals ran.")
    if len(found.tied) > 1:
        told.append(_tie_sentence(found))
    told += _outs(found.out)
    if any(row.routes_at_random for row in rows):
        told.append(
            "Losses were not compared: forced balance of experts routes at random, differently in every layout."
        )
    if (stages := refinement_sentence(rows)) is not None:
        told.append(stages)
    if found.drift is not None:
        told.append(found.drift.sentence())
    again = sum(row.source == "repeat" for row in rows)
    if again:
        told.append(f"{again} trials that the machine had disturbed were measured again.")
    if found.doubts:
        more = f" ({len(found.doubts)} such lines)" if len(found.doubts) > 1 else ""
        told.append(f"Measured on a disturbed machine, so less sure: {found.doubts[0]}{more}.")
    return told


def _tie_sentence(found: Answer) -> str:
    tied = found.tied
    apart = max(max(one.over_best.high - 1, 1 - one.over_best.low) for one in tied[1:])
    names = ", ".join(
        f"{one.layout.label()} ({one.over_best.value - 1:+.1%}, {one.metrics.peak_allocated_gib:.3g} GiB)"
        for one in tied[1:]
    )
    least = min(tied, key=lambda one: one.metrics.peak_allocated_gib)
    memory = "it" if least is tied[0] else least.layout.label()
    return (
        f"Tie within {apart:.1%}: noise cannot tell the best, {tied[0].layout.label()}, from {names}; "
        f"of these {memory} takes the least memory."
    )


def _outs(out: Mapping[Layout, str]) -> list[str]:
    return [f"Out: {layout.label()} {why}." for layout, why in out.items()]
