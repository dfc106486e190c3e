"""A trial and its rerun, side by side: what came out alike, and what the machines differ in. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from tuner.trial.contract import Metrics, Outcome, TrialResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of both runs."""

    name: str
    """With its unit."""
    before: float
    after: float

    @property
    def change(self) -> float:
        """Relative to before."""
        return self.after / self.before - 1 if self.before else float(self.after != self.before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a rerun says of a trial."""

    same_outcome: bool
    same_speed: bool | None
    """Whether the 95% intervals of the step times overlap; None where one was not measured."""
    figures: tuple[Figure, ...]
    loss_difference: float | None
    """The largest relative difference of a step's loss, over the steps that both did."""
    versions: Mapping[str, tuple[str, str]]
    """What is not the same now: before and after."""

    @property
    def reproduced(self) -> bool:
        """Whether it ended alike, and as fast."""
        return self.same_outcome and self.same_speed is not False


def compare(before: TrialResult, after: TrialResult) -> Comparison:
    """Compare a trial's result with that of its rerun."""
    old, new = before.metrics, after.metrics
    return Comparison(
        same_outcome=before.outcome is after.outcome,
        same_speed=None if old is None or new is None else _overlap(old, new),
        figures=() if old is None or new is None else _figures(old, new),
        loss_difference=None if old is None or new is None else _loss_difference(old, new),
        versions=_changed(before, after),
    )


def _overlap(old: Metrics, new: Metrics) -> bool:
    return old.step_time_low_ms <= new.step_time_high_ms and new.step_time_low_ms <= old.step_time_high_ms


def _figures(old: Metrics, new: Metrics) -> tuple[Figure, ...]:
    names = {
        "step time, ms": "step_time_ms",
        "tokens/s/GPU": "tokens_per_s_per_gpu",
        "peak allocated, GiB": "peak_allocated_gib",
        "peak reserved, GiB": "peak_reserved_gib",
    }
    pairs = ((name, getattr(old, field), getattr(new, field)) for name, field in names.items())
    return tuple(
        Figure(name=name, before=before, after=after)
        for name, before, after in pairs
        if before is not None and after is not None
    )


def _loss_difference(old: Metrics, new: Metrics) -> float | None:
    shared = zip(old.losses, new.losses, strict=False)
    return max((abs(b - a) / abs(a) if a else abs(b) for a, b in shared), default=None)


def _changed(before: TrialResult, after: TrialResult) -> dict[str, tuple[str, str]]:
    old = {**before.versions, "device": before.device_name}
    new = {**after.versions, "device": after.device_name}
    if after.outcome is not Outcome.COMPLETED and not after.versions:
        return {}
    return {
        name: (old.get(name, "none"), new.get(name, "none"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "none") != new.get(name, "none")
    }
