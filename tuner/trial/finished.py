"""The trials of a sweep as its folders hold them: the record that everything else is a view of."""

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
"""Sources of the trials that measure a layout for the first time."""

UNFINISHED: Final = frozenset({Outcome.INFRASTRUCTURE, Outcome.INTERRUPTED})
"""Outcomes that say nothing of the layout: the trial runs again, under its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSource:
    """Why the sweep ran a trial; `source.json` in its folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: str
    """`baseline`, `seed` or `sampler`; `repeat` of a suspect trial, `canary` for the machine's drift, `final`."""
    note: str = ""
    """Which table a seed comes from, and how it was moved."""
    around: tuple[int, ...] = ()
    """The trials whose layouts the second stage varies (tuner.search.refinement); empty in the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedTrial:
    """One finished trial of a sweep."""

    number: int
    source: str
    note: str
    layout: Layout
    precision: Precision
    """Of the workload: it says how far two losses may lie apart."""
    routes_at_random: bool = False
    """Of the workload: tokens go to experts that are drawn, differently in every layout, so that losses say nothing."""
    draws_weights: bool = False
    """Its program draws the first weights itself, other ones where other ranks hold them: see `draws_weights`."""
    around: tuple[int, ...] = ()
    """As in its TrialSource."""
    result: TrialResult


def draws_weights(program: Program, workload: Workload, layout: Layout) -> bool:
    """Whether a trial's first weights are its program's own, other ones under another layout.

    Ours start every layout from the same ones (launchers/programs/harness/weights.py); so does a recipe of
    Bridge, but for weights that are born sharded or in fp8.
    """
    match program:
        case MegatronLm() | Command():
            return True
        case BridgeRecipe():
            return workload.fp8_param or layout.use_megatron_fsdp
        case _:
            return False


def trial_folder(results: Path, number: int) -> TrialFolder:
    """The folder of a trial in a sweep's results: `trials/t0000`."""
    return TrialFolder(results / "trials" / f"t{number:04d}")


def read_trials(results: Path) -> list[FinishedTrial]:
    """Read the finished trials of a sweep, by number; a folder without `result.json` is left out.

    Raises:
        InputError: naming the file that is missing beside a result, torn, or of another trial.
    """
    finished = [TrialFolder(path) for path in sorted(results.glob("trials/t*"))]
    rows = [read_trial(folder) for folder in finished if folder.result.exists()]
    return sorted(rows, key=lambda row: row.number)


def read_trial(folder: TrialFolder) -> FinishedTrial:
    """Read one finished trial; raises InputError as `read_trials` does."""
    spec = read_json(TrialSpec, folder.spec)
    if trial_folder(folder.path.parent.parent, spec.number).path.name != folder.path.name:
        raise InputError(
            f"{folder.spec}: key 'number' is {spec.number}, but the folder is {folder.path.name}; was it copied?"
        )
    chosen = read_json(TrialSource, folder.source)
    return FinishedTrial(
        number=spec.number,
        source=chosen.source,
        note=chosen.note,
        around=chosen.around,
        layout=spec.layout,
        precision=spec.workload.precision,
        routes_at_random=spec.workload.moe_router_force_load_balancing,
        draws_weights=draws_weights(spec.program, spec.workload, spec.layout),
        result=read_json(TrialResult, folder.result),
    )


def completed(rows: Iterable[FinishedTrial]) -> list[tuple[FinishedTrial, Metrics]]:
    """The completed trials with what they measured, fastest first; the earlier one where two are equal."""
    measured = [(row, row.result.metrics) for row in rows if row.result.metrics is not None]
    return sorted(measured, key=lambda pair: (pair[1].step_time_ms, pair[0].number))
