"""Reads the finished trials of a sweep from its folders, the record from which every view can be rebuilt."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

from pydantic import ConfigDict

from tuner.core.layout import Layout
from tuner.core.workload import Precision, Workload
from tuner.errors import InputError
from tuner.files import STRICT, read_json
from tuner.printable import OneLine
from tuner.trial.contract import Metrics, Outcome, RankRecord, TrialFolder, TrialResult, TrialSpec
from tuner.trial.index import Entry, read_index, stamp_of, write_index
from tuner.trial.program import BridgeRecipe, Command, MegatronLm, Program
from tuner.validation import adapter

SEARCHED: Final = ("baseline", "seed", "sampler")
"""The values of `TrialSource.source` of trials that measure a layout for the first time."""

UNFINISHED: Final = frozenset({Outcome.INFRASTRUCTURE, Outcome.INTERRUPTED})
"""Outcomes that say nothing about the layout: the trial is not finished, and runs again under its number."""

INDEX: Final = "trials.db"
"""The name of the index of the trials in a sweep's results folder."""
INDEX_VERSION: Final = 1
"""The version of the index. It grows with each change of what a FinishedTrial holds, or of how it follows from the
files of a trial."""
MOST_UNINDEXED: Final = 100
"""Trials that are read from their folders before the index is brought up to date. Assumed: they take 30 ms, and the
folder of a short sweep needs no index."""
MOST_UNINDEXED_SHARE: Final = 0.02
"""The share of all trials that may be read so even beyond MOST_UNINDEXED, since the index is written as a whole.
Assumed."""

_Ranks = tuple[RankRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSource:
    """The reason for which the sweep ran a trial; the file `source.json` in the trial's folder holds it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: OneLine
    """The kind of the trial.

    `baseline`, `seed` and `sampler` measure a layout for the first time. A `repeat` measures a disturbed trial again. A
    `canary` runs the baseline to show the machine's drift. A `final` measures a finalist or the baseline again.
    """
    note: OneLine = ""
    """For a seed, the heuristic that it comes from and how it was moved; for a repeat, the trial that it repeats."""
    around: tuple[int, ...] = ()
    """Numbers of the trials that are the centres of the refinement (tuner.search.refinement); empty if the trial ran
    before the refinement began.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedTrial:
    """One finished trial of a sweep: what was run, why, and how it ended."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

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


def trial_name(number: int) -> str:
    """Return the name of a trial's folder, as `t0000`."""
    return f"t{number:04d}"


def trial_folder(results: Path, number: int) -> TrialFolder:
    """Return the folder of a trial in a sweep's results folder, as `trials/t0000`."""
    return TrialFolder(results / "trials" / trial_name(number))


def read_trials(results: Path, *, with_ranks: bool = True) -> list[FinishedTrial]:
    """Read the finished trials of a sweep, in the order of their numbers; a folder without `result.json` is left out.

    Trials whose files have not changed are taken from the index beside the trial folders (`tuner.trial.index`). If many
    others had to be read, the index is brought up to date.

    Args:
        results: the results folder of the sweep.
        with_ranks: whether the results are to hold the records of their ranks, which take most of the time.

    Raises:
        InputError: if a file beside a result is missing, torn, or of another trial; the error names the file.
    """
    names = _names(results / "trials")
    stamps = {name: _stamp(results, name) for name in names}
    entries = read_index(results / INDEX, INDEX_VERSION)
    entries = {name: entry for name, entry in entries.items() if entry.stamp == stamps.get(name, "")}
    trials = _indexed(entries, with_ranks=with_ranks)
    entries = {name: entries[name] for name in trials}
    folders = [TrialFolder(results / "trials" / name) for name in names if name not in trials]
    read = {folder.path.name: read_trial(folder) for folder in folders if folder.result.exists()}
    if len(read) > max(MOST_UNINDEXED, MOST_UNINDEXED_SHARE * len(trials)):
        new = {name: _entry(trial, stamp) for name, trial in read.items() if (stamp := stamps[name])}
        write_index(results / INDEX, INDEX_VERSION, entries | new)
    if not with_ranks:
        read = {name: _with_ranks(trial, ()) for name, trial in read.items()}
    return sorted([*trials.values(), *read.values()], key=lambda trial: trial.number)


def _names(trials: Path) -> list[str]:
    """Return the names of all trial folders, sorted; none if there is no such folder."""
    try:
        with os.scandir(trials) as entries:
            return sorted(entry.name for entry in entries if entry.name.startswith("t"))
    except FileNotFoundError:
        return []


def _stamp(results: Path, name: str) -> str | None:
    folder = f"{results}/trials/{name}"
    return stamp_of((f"{folder}/result.json", f"{folder}/spec.json", f"{folder}/source.json"))


def _entry(trial: FinishedTrial, stamp: str) -> Entry:
    """Return what the index holds of a trial."""
    return Entry(
        stamp,
        adapter(FinishedTrial).dump_json(trial, exclude_defaults=True, exclude={"result": {"ranks"}}),
        adapter(_Ranks).dump_json(trial.result.ranks, exclude_defaults=True),
    )


def _indexed(entries: Mapping[str, Entry], *, with_ranks: bool) -> dict[str, FinishedTrial]:
    """Return the trials that the index holds, by the names of their folders; none if it is damaged."""
    try:
        trials = adapter(list[FinishedTrial]).validate_json(
            _json_list(entry.trial for entry in entries.values())
        )
        names = [trial_name(trial.number) for trial in trials]
        if names != list(entries):
            return {}
        if with_ranks:
            ranks = adapter(list[_Ranks]).validate_json(_json_list(entry.ranks for entry in entries.values()))
            trials = [_with_ranks(*pair) for pair in zip(trials, ranks, strict=True)]
    except ValueError:  # pydantic's errors are ValueErrors
        return {}
    return dict(zip(names, trials, strict=True))


def _json_list(texts: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(texts) + b"]"


def _with_ranks(trial: FinishedTrial, ranks: _Ranks) -> FinishedTrial:
    return replace(trial, result=replace(trial.result, ranks=ranks))


def read_trial(folder: TrialFolder) -> FinishedTrial:
    """Read one finished trial.

    Raises:
        InputError: if a file is missing, torn, or of another trial; the error names the file.
    """
    spec, origin = read_json(TrialSpec, folder.spec), read_json(TrialSource, folder.source)
    return finished_trial(folder, spec, origin, read_json(TrialResult, folder.result))


def finished_trial(
    folder: TrialFolder, spec: TrialSpec, origin: TrialSource, result: TrialResult
) -> FinishedTrial:
    """Return the finished trial that the files of a folder describe.

    Raises:
        InputError: if the files are of another trial.
    """
    if trial_name(spec.number) != folder.path.name:
        raise InputError(
            f"{folder.spec}: key 'number' is {spec.number}, but the folder is {folder.path.name}; was it copied?"
        )
    return FinishedTrial(
        number=spec.number,
        source=origin.source,
        note=origin.note,
        around=origin.around,
        layout=spec.layout,
        precision=spec.workload.precision,
        routes_at_random=spec.workload.moe_router_force_load_balancing,
        draws_weights=draws_weights(spec.program, spec.workload, spec.layout),
        result=result,
    )


def completed(trials: Iterable[FinishedTrial]) -> list[tuple[FinishedTrial, Metrics]]:
    """Return the completed trials with their metrics, fastest first; among equally fast ones, earliest first."""
    measured = [(trial, trial.result.metrics) for trial in trials if trial.result.metrics is not None]
    return sorted(measured, key=lambda pair: (pair[1].step_time_ms, pair[0].number))
