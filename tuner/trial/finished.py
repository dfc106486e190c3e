"""Reads the finished trials of a sweep from its folders, the record from which every view can be rebuilt."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from pydantic import ConfigDict

from tuner.core.layout import Layout
from tuner.core.workload import Precision, Workload
from tuner.errors import InputError
from tuner.files import STRICT, read_json
from tuner.trial.contract import Metrics, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.program import BridgeRecipe, Command, MegatronLm, Program

SEARCHED: Final = ("baseline", "seed", "sampler")
"""The values of `TrialSource.source` of trials that measure a layout for the first time."""

UNFINISHED: Final = frozenset({Outcome.INFRASTRUCTURE, Outcome.INTERRUPTED})
"""Outcomes that say nothing about the layout: the trial is not finished, and runs again under its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSource:
    """The reason for which the sweep ran a trial; the file `source.json` in the trial's folder holds it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: str
    """The kind of the trial.

    `baseline`, `seed` and `sampler` measure a layout for the first time. A `repeat` measures a disturbed trial again. A
    `canary` runs the baseline to show the machine's drift. A `final` measures a finalist or the baseline again.
    """
    note: str = ""
    """For a seed, the heuristic that it comes from and how it was moved; for a repeat, the trial that it repeats."""
    around: tuple[int, ...] = ()
    """Numbers of the trials that are the centres of the refinement (tuner.search.refinement); empty if the trial ran
    before the refinement began.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedTrial:
    """One finished trial of a sweep: what was run, why, and how it ended."""

    number: int
    """The trial's number in its sweep, from 0."""
    source: str
    """The kind of the trial: `TrialSource.source`."""
    note: str
    """Where the trial's layout comes from, in more words than `source`: `TrialSource.note`."""
    layout: Layout
    precision: Precision
    """Precision of the workload; it decides how far apart two losses may lie."""
    routes_at_random: bool = False
    """Whether the workload sends tokens to random experts, which differ between layouts: losses cannot be compared."""
    draws_weights: bool = False
    """Whether the first weights depend on the layout, so that losses lie further apart: see `draws_weights` below."""
    around: tuple[int, ...] = ()
    """Numbers of the trials that are the centres of the refinement: `TrialSource.around`."""
    result: TrialResult


def draws_weights(program: Program, workload: Workload, layout: Layout) -> bool:
    """Return whether the first weights of a trial depend on its layout, because the program draws them on each rank.

    The built-in program starts every layout from equal weights (launchers/programs/harness/weights.py). A recipe of
    Bridge does so too, except for weights that are created sharded or in fp8. Any other program draws its weights.
    """
    match program:
        case MegatronLm() | Command():
            return True
        case BridgeRecipe():
            return workload.fp8_param or layout.use_megatron_fsdp
        case _:
            return False


def trial_folder(results: Path, number: int) -> TrialFolder:
    """Return the folder of a trial in a sweep's results folder, as `trials/t0000`."""
    return TrialFolder(results / "trials" / f"t{number:04d}")


def read_trials(results: Path) -> list[FinishedTrial]:
    """Read the finished trials of a sweep, in the order of their numbers; a folder without `result.json` is left out.

    Raises:
        InputError: if a file beside a result is missing, torn, or of another trial; the error names the file.
    """
    folders = [TrialFolder(path) for path in sorted(results.glob("trials/t*"))]
    trials = [read_trial(folder) for folder in folders if folder.result.exists()]
    return sorted(trials, key=lambda trial: trial.number)


def read_trial(folder: TrialFolder) -> FinishedTrial:
    """Read one finished trial.

    Raises:
        InputError: if a file is missing, torn, or of another trial; the error names the file.
    """
    spec = read_json(TrialSpec, folder.spec)
    if trial_folder(folder.path.parent.parent, spec.number).path.name != folder.path.name:
        raise InputError(
            f"{folder.spec}: key 'number' is {spec.number}, but the folder is {folder.path.name}; was it copied?"
        )
    origin = read_json(TrialSource, folder.source)
    return FinishedTrial(
        number=spec.number,
        source=origin.source,
        note=origin.note,
        around=origin.around,
        layout=spec.layout,
        precision=spec.workload.precision,
        routes_at_random=spec.workload.moe_router_force_load_balancing,
        draws_weights=draws_weights(spec.program, spec.workload, spec.layout),
        result=read_json(TrialResult, folder.result),
    )


def completed(trials: Iterable[FinishedTrial]) -> list[tuple[FinishedTrial, Metrics]]:
    """Return the completed trials with their metrics, fastest first; among equally fast ones, earliest first."""
    measured = [(trial, trial.result.metrics) for trial in trials if trial.result.metrics is not None]
    return sorted(measured, key=lambda pair: (pair[1].step_time_ms, pair[0].number))
