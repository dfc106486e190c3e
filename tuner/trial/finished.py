"""Reads the finished trials of a sweep from the trial folders, the record from which every view can be rebuilt."""

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
"""The values of `TrialSource.source` that mean that a trial measures its layout for the first time."""

UNFINISHED: Final = frozenset({Outcome.INFRASTRUCTURE, Outcome.INTERRUPTED})
"""Outcomes that say nothing about the layout. Such a trial is not finished, and runs again under its number."""

INDEX: Final = "trials.db"
"""The file name of the index of the finished trials in a sweep's results folder."""
INDEX_VERSION: Final = 1
"""The version of the index. Increase it with each change of the fields of FinishedTrial, or of how they are derived
from a trial's files."""
MOST_UNINDEXED: Final = 100
"""The most trials that are read from their folders without writing a new index afterwards. Assumed: reading them takes
30 ms, and the folder of a short sweep needs no index."""
MOST_UNINDEXED_SHARE: Final = 0.02
"""The most trials that are read from their folders without writing a new index, as a share of the trials in the index;
it counts if it allows more than MOST_UNINDEXED. Assumed: the index is always written as a whole, which takes time."""

_Ranks = tuple[RankRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSource:
    """The reason why a sweep ran a trial: the content of `source.json` in the trial's folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: OneLine
    """The kind of the trial.

    `baseline`, `seed` and `sampler` measure a layout for the first time. A `repeat` measures a disturbed trial again. A
    `canary` runs the baseline to show the machine's drift. A `final` measures a finalist or the baseline again.
    """
    note: OneLine = ""
    """For a seed, the heuristic that it comes from and how it was changed to be valid; for a repeat, the trial that it
    repeats."""
    around: tuple[int, ...] = ()
    """The numbers of the trials whose layouts are the centres of the refinement; empty if the trial ran before the
    refinement began.
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
    """Where the trial's layout comes from, in detail: `TrialSource.note`."""
    layout: Layout
    precision: Precision
    """The precision of the workload; it determines how much the losses of two layouts may differ."""
    routes_at_random: bool = False
    """Whether the workload routes tokens to random experts. These differ between layouts, so losses cannot be compared.
    """
    draws_weights: bool = False
    """Whether the initial weights depend on the layout, so that losses differ more: what `draws_weights()` returns."""
    around: tuple[int, ...] = ()
    """The numbers of the trials whose layouts are the centres of the refinement: `TrialSource.around`."""
    result: TrialResult


def draws_weights(program: Program, workload: Workload, layout: Layout) -> bool:
    """Return whether a trial's initial weights depend on its layout, since each rank initialises its own at random.

    The built-in program gives every layout the same initial weights (launchers/programs/harness/weights.py). So does a
    recipe of Bridge, unless its weights are created sharded or in fp8. In other programs they depend on the layout.
    """
    match program:
        case MegatronLm() | Command():
            return True
        case BridgeRecipe():
            return workload.fp8_param or layout.use_megatron_fsdp
        case _:
            return False


def trial_name(number: int) -> str:
    """Return the name of a trial's folder, such as `t0007` for trial 7."""
    return f"t{number:04d}"


def trial_folder(results: Path, number: int) -> TrialFolder:
    """Return the folder of a trial, such as `trials/t0007` in the sweep's folder `results`."""
    return TrialFolder(results / "trials" / trial_name(number))


def read_trials(results: Path, *, with_ranks: bool = True) -> list[FinishedTrial]:
    """Return the finished trials of a sweep in order of their numbers; a folder without `result.json` is left out.

    Trials whose files have not changed are read from the index in the results folder (`tuner.trial.index`), all others
    from their folders. If there were many others, a new index is written.

    Args:
        results: the results folder of the sweep.
        with_ranks: whether to read the ranks' records into the results, which takes most of the time.

    Raises:
        InputError: if a file of a finished trial is missing, torn, or of another trial; the error names the file.
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
    """Return the sorted names of the trial folders in the folder `trials`; empty if that folder does not exist."""
    try:
        with os.scandir(trials) as entries:
            return sorted(entry.name for entry in entries if entry.name.startswith("t"))
    except FileNotFoundError:
        return []


def _stamp(results: Path, name: str) -> str | None:
    folder = f"{results}/trials/{name}"
    return stamp_of((f"{folder}/result.json", f"{folder}/spec.json", f"{folder}/source.json"))


def _entry(trial: FinishedTrial, stamp: str) -> Entry:
    """Return the entry for a trial in the index, valid as long as the trial's files have this stamp."""
    return Entry(
        stamp,
        adapter(FinishedTrial).dump_json(trial, exclude_defaults=True, exclude={"result": {"ranks"}}),
        adapter(_Ranks).dump_json(trial.result.ranks, exclude_defaults=True),
    )


def _indexed(entries: Mapping[str, Entry], *, with_ranks: bool) -> dict[str, FinishedTrial]:
    """Return the trials of the index's entries, by folder name; empty if any entry is damaged."""
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
    """Return the finished trial in a folder, read from its files.

    Raises:
        InputError: if a file is missing, torn, or of another trial; the error names the file.
    """
    spec, origin = read_json(TrialSpec, folder.spec), read_json(TrialSource, folder.source)
    return finished_trial(folder, spec, origin, read_json(TrialResult, folder.result))


def finished_trial(
    folder: TrialFolder, spec: TrialSpec, origin: TrialSource, result: TrialResult
) -> FinishedTrial:
    """Return the finished trial made of the contents of a folder's `spec.json`, `source.json` and `result.json`.

    Raises:
        InputError: if the spec has another trial number than the folder's name.
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
    """Return the completed trials with their metrics, fastest first; equally fast ones in order of their numbers."""
    measured = [(trial, trial.result.metrics) for trial in trials if trial.result.metrics is not None]
    return sorted(measured, key=lambda pair: (pair[1].step_time_ms, pair[0].number))
