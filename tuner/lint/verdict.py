"""The verdicts of lint on a job and on a recipe, with the valid layouts near a refused one."""

from dataclasses import dataclass
from typing import Final

from tuner.core.layout import Layout
from tuner.frameworks.megatron_bridge.facts import RecipeFacts
from tuner.predict.memory.peak import StageMemory
from tuner.rules.rule import Violation

LIKELY: Final = 0.5
"""A layout that fits with a lower probability is expected to run out of memory (assumed: even odds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearLayout:
    """A valid layout near one that is refused or does not fit."""

    layout: Layout
    fits: float
    """Probability that its peak memory is at most the GPU's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobVerdict:
    """The verdict on a job with a layout, before it runs."""

    layout: Layout
    refused: tuple[Violation, ...]
    """The rules that the layout breaks and for which Megatron would end the job, in the order of the rules."""
    warnings: tuple[str, ...]
    """Choices that make the job slow, one per line."""
    worst: StageMemory | None
    """The pipeline stage that needs the most memory; None if a rule of ours refuses the layout."""
    fits: float | None
    """Probability that the peak memory is at most the GPU's memory; None if a rule of ours refuses the layout."""
    nearest: tuple[NearLayout, ...]
    """The valid layouts that differ least from the job's; empty if the job's layout starts and is likely to fit."""

    memory_counts: bool = True
    """Whether the predicted memory is the job's own; if not, it is only an upper bound."""

    @property
    def starts(self) -> bool:
        """Whether the job starts, and is likely to fit."""
        return not self.refused and (
            not self.memory_counts or (self.fits is not None and self.fits >= LIKELY)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeVerdict:
    """The verdict on a recipe of Megatron Bridge, before it runs."""

    facts: RecipeFacts
    verdict: JobVerdict | None = None
    """The verdict on the recipe's layout; None if the recipe's architecture cannot be stated."""
    refused: tuple[Violation, ...] = ()
    """If `verdict` is None: the rules about grids that the layout breaks, and Bridge's own error."""
    unjudged: str = ""
    """If `verdict` is None: the reason why nothing else is known."""
    notes: tuple[str, ...] = ()
    """Settings that the recipe fixes and no layout states."""

    @property
    def state(self) -> str:
        """The verdict in words: `starts`, `refused`, `too large` or `not judged`."""
        if self.refused or (self.verdict and self.verdict.refused):
            return "refused"
        if self.verdict is None:
            return "not judged"
        return "starts" if self.verdict.starts else "too large"
