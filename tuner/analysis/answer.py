"""Computes the answer of a sweep: which layout is fastest, by how much, how sure that is, and which layouts cannot win.

Before the finals, each layout is ranked by one measurement. Once every finalist has run in the finals, only the finals
count, and each finalist is ranked by all its runs in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.analysis.candidates import candidates, ruled_out
from tuner.analysis.drift import Drift, drift
from tuner.analysis.runs import baseline_layout, finals_of
from tuner.analysis.standings import Standing, rank_candidates, rank_finalists
from tuner.core.layout import Layout
from tuner.trial.finished import FinishedTrial


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer of a sweep: its layouts ranked by step time."""

    ranking: tuple[Standing, ...]
    """The finalists, or before the finals all measured layouts that can win, fastest first; never empty."""
    is_final: bool
    """Whether the ranking is computed from finals."""
    baseline: Standing | None
    """The baseline's standing; None if the baseline is not in the ranking."""
    out: Mapping[Layout, str]
    """The layouts that were measured but cannot win, each with the reason."""
    drift: Drift | None
    """The machine's drift; None if there were too few runs to estimate it."""

    @property
    def best(self) -> Standing:
        """The standing of the fastest layout."""
        return self.ranking[0]

    @property
    def tied(self) -> tuple[Standing, ...]:
        """The standings that do not differ from the best by more than noise; the best itself comes first."""
        return tuple(standing for standing in self.ranking if standing.over_best.is_tie)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to trust the measurements of the best layout or of the baseline, one phrase per reason."""
        standings = [self.best, self.baseline] if self.baseline is not self.best else [self.best]
        return tuple(
            f"t{run.number:04d} {run.layout.label()}: {suspicion}"
            for standing in standings
            if standing is not None
            for run in standing.runs
            for suspicion in run.result.suspicions
        )


def answer(trials: Sequence[FinishedTrial]) -> Answer | None:
    """Return the answer computed from finished trials; None if no layout was measured, or all measured ones are out."""
    trials = sorted(trials, key=lambda trial: trial.number)
    machine_drift, out = drift(trials), ruled_out(trials)
    finals = counting_finals(trials, out)
    ranking = rank_finalists(finals) if finals else rank_candidates(candidates(trials, machine_drift, out))
    if not ranking:
        return None
    start = baseline_layout(trials)
    baseline = next((standing for standing in ranking if standing.layout == start), None)
    return Answer(
        ranking=tuple(ranking), is_final=bool(finals), baseline=baseline, out=out, drift=machine_drift
    )


def counting_finals(
    trials: Sequence[FinishedTrial], out: Mapping[Layout, str]
) -> dict[Layout, list[FinishedTrial]]:
    """Return the completed finals by layout, without the layouts in `out`, if the answer is computed from finals.

    The answer is computed from finals once each finalist has run and at least two layouts have completed a final.
    Before that, the result is empty.
    """
    finals = _completed_by_layout([final for final in finals_of(trials) if final.layout not in out])
    return finals if len(finals) > 1 and _first_round_is_over(trials) else {}


def _first_round_is_over(trials: Sequence[FinishedTrial]) -> bool:
    """Return whether every finalist has run once: the baseline has run, which is the last in the first round."""
    start = next((trial for trial in trials if trial.source == "baseline" and trial.result.metrics), None)
    return start is None or any(final.layout == start.layout for final in finals_of(trials))


def _completed_by_layout(finals: Sequence[FinishedTrial]) -> dict[Layout, list[FinishedTrial]]:
    runs: dict[Layout, list[FinishedTrial]] = {}
    for final in finals:
        if final.result.metrics is not None:
            runs.setdefault(final.layout, []).append(final)
    return runs
