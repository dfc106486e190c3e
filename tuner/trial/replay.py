"""Shows which program a rerun of a trial would run, and compares the results of a trial and its rerun."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from tuner.printable import one_line
from tuner.trial.contract import Metrics, Outcome, TrialResult, TrialSpec
from tuner.trial.program import BridgeRecipe, Command, MegatronLm


def own_program(spec: TrialSpec) -> list[str]:
    """Return lines for the user that show the program in a trial's spec; empty if it is one of megatune's own."""
    match spec.program:
        case Command():
            return [f"the command: {one_line(shlex.join(spec.program.command))}"]
        case MegatronLm():
            return [f"the command under torchrun: {one_line(shlex.join(spec.program.megatron_lm))}"]
        case BridgeRecipe():
            function = "" if spec.program.function is None else f", function {spec.program.function}"
            arguments = "".join(f", {name} = {value!r}" for name, value in spec.program.arguments.items())
            return [one_line(f"the recipe of Megatron Bridge: {spec.program.recipe}{function}{arguments}")]
        case _:
            return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure that both a trial and its rerun have measured."""

    name: str
    """The name of the figure, with its unit. `before` is the trial's value, and `after` is the rerun's."""
    before: float
    after: float

    @property
    def change(self) -> float:
        """The relative change: after / before - 1. If `before` is 0: 0 if `after` is 0, too, else 1."""
        return self.after / self.before - 1 if self.before else float(self.after != self.before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How the result of a rerun compares with the result of its trial."""

    same_outcome: bool
    same_speed: bool | None
    """Whether the 95% intervals of the two step times overlap; None if one of them was not measured."""
    figures: tuple[Figure, ...]
    """The figures that both the trial and the rerun measured."""
    loss_difference: float | None
    """The largest relative difference between the two losses of a step, over the steps that both ran; None if one of
    the two measured nothing."""
    versions: Mapping[str, tuple[str, str]]
    """The versions that differ, by name, of the trial and of the rerun. The model of the GPU or CPU is among them as
    `device`."""

    @property
    def reproduced(self) -> bool:
        """Whether the rerun had the outcome of its trial and, if both were measured, equal speed (`same_speed`)."""
        return self.same_outcome and self.same_speed is not False


def compare(before: TrialResult, after: TrialResult) -> Comparison:
    """Compare the result of a trial, `before`, with the result of its rerun, `after`."""
    old, new = before.metrics, after.metrics
    return Comparison(
        same_outcome=before.outcome is after.outcome,
        same_speed=None if old is None or new is None else _overlap(old, new),
        figures=() if old is None or new is None else _figures(old, new),
        loss_difference=None if old is None or new is None else _loss_difference(old, new),
        versions=_changed_versions(before, after),
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


def _changed_versions(before: TrialResult, after: TrialResult) -> dict[str, tuple[str, str]]:
    old = {**before.versions, "device": before.device_name}
    new = {**after.versions, "device": after.device_name}
    if after.outcome is not Outcome.COMPLETED and not after.versions:
        return {}
    return {
        name: (old.get(name, "none"), new.get(name, "none"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "none") != new.get(name, "none")
    }
