"""The verdicts of `megatune lint` on a job and on a recipe, with the valid layouts near a refused one."""

from dataclasses import dataclass
from typing import Final

from tuner.core.layout import Layout
from tuner.frameworks.megatron_bridge.facts import RecipeFacts
from tuner.predict.memory.peak import StageMemory
from tuner.rules.rule import Violation

LIKELY: Final = 0.5
"""A layout whose probability to fit is lower than this is expected to run out of memory. Assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearLayout:
    """A valid layout that differs little from a layout that is refused or does not fit."""

    layout: Layout
    fits: float
    """The probability that the layout's peak memory is at most the GPU's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobVerdict:
    """The verdict on a job with a given layout, made without running it."""

    layout: Layout
    refused: tuple[Violation, ...]
    """The broken rules because of which Megatron would end the job, and then the errors of Megatron Bridge."""
    warnings: tuple[str, ...]
    """Choices that cost the job speed or memory, one per line."""
    worst: StageMemory | None
    """The pipeline stage with the highest predicted memory; None if one of our rules refuses the layout."""
    fits: float | None
    """The probability that the peak memory is at most the GPU's memory; None if one of our rules refuses the layout."""
    nearest: tuple[NearLayout, ...]
    """The valid layouts that differ least from the job's; empty if no rule refuses the layout and it is likely to fit.
    """

    memory_counts: bool = True
    """Whether the predicted memory is that of the job; if not, it is only an upper bound."""

    @property
    def starts(self) -> bool:
        """Whether nothing refuses the job, and it is likely to fit or its memory does not count (`memory_counts`)."""
        return not self.refused and (
            not self.memory_counts or (self.fits is not None and self.fits >= LIKELY)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeVerdict:
    """The verdict on a recipe of Megatron Bridge, made without running it."""

    facts: RecipeFacts
    verdict: JobVerdict | None = None
    """The verdict on a job with the recipe's layout; None if Bridge could not build the recipe, or if `Model` or
    `Layout` cannot state what the recipe has."""
    refused: tuple[Violation, ...] = ()
    """If `verdict` is None: the broken rules about degrees of parallelism and batch sizes, and Bridge's own error."""
    unjudged: str = ""
    """If `verdict` is None: the reason why there is no verdict."""
    notes: tuple[str, ...] = ()
    """One note for each setting of the recipe that changes memory, speed or validity and that no Layout states."""

    @property
    def state(self) -> str:
        """The verdict as a short text: `starts`, `refused`, `too large` or `not judged`."""
        if self.refused or (self.verdict and self.verdict.refused):
            return "refused"
        if self.verdict is None:
            return "not judged"
        return "starts" if self.verdict.starts else "too large"
