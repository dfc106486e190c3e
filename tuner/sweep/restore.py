"""Reads the state of a sweep from its results folder, so that a resumed sweep continues from it."""

from dataclasses import replace

from tuner.errors import InputError
from tuner.files import read_json, to_data
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import IDENTITY, SweepFolder, differences
from tuner.sweep.state import SweepState, WaitingTrial, attempts_spent, tried_again
from tuner.trial.contract import Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, TrialSource, finished_trial
from tuner.trial.program import BridgeRecipe, Program


def restored(folder: SweepFolder, sweep: Sweep) -> SweepState:
    """The state of a sweep, read from its trial folders.

    Raises:
        InputError: if a file is torn, a trial folder is missing among others, or a trial is one of another sweep.
    """
    ended: list[FinishedTrial] = []
    waiting: list[WaitingTrial] = []
    unexplained: list[WaitingTrial] = []
    centres: tuple[int, ...] = ()
    lost_s, number = 0.0, 0
    while (trial := folder.trial(number)).spec.exists():
        spec = read_json(TrialSpec, trial.spec)
        _refuse_foreign(spec, trial, sweep)
        source = read_json(TrialSource, trial.source)
        result = read_json(TrialResult, trial.result) if trial.result.exists() else None
        spent = attempts_spent(spec.attempt, result)
        lost_s += lost_attempts_s(trial)
        if result is not None and spent is None:
            ended.append(finished_trial(trial, spec, source, result))
            if result.outcome is Outcome.UNEXPLAINED and spec.attempt == 1:
                unexplained.append(
                    WaitingTrial(number=number, layout=spec.layout, source=source, attempts_spent=1)
                )
        else:
            waiting.append(
                WaitingTrial(number=number, layout=spec.layout, source=source, attempts_spent=spent or 0)
            )
            lost_s += result.durations.total_s if result else 0.0
        centres = source.around or centres
        number += 1
    _refuse_gap(folder, number)
    state = SweepState(
        ended=tuple(ended),
        waiting=tuple(waiting),
        lost_s=lost_s,
        centres=centres if sweep.refined else (),
    )
    return tried_again(state, unexplained)


def lost_attempts_s(trial: TrialFolder) -> float:
    """Wall clock in seconds of a trial's attempts that were followed by another attempt."""
    total_s, attempt = 0.0, 1
    while (aside := TrialFolder(trial.set_aside(attempt))).path.exists():
        if aside.result.exists():
            total_s += read_json(TrialResult, aside.result).durations.total_s
        attempt += 1
    return total_s


def _refuse_gap(folder: SweepFolder, count: int) -> None:
    """Refuse trials with results that are numbered after a missing folder, since numbers have no gap."""
    ended = (path.parent.name for path in folder.trials.glob("t*/result.json"))
    later = [int(name[1:]) for name in ended if name[1:].isdecimal() and int(name[1:]) > count]
    if later:
        missing = folder.trial(count)
        raise InputError(
            f"{missing.path}: is missing or holds no {missing.spec.name}, but trial t{min(later):04d} has ended: put "
            "it back; to have one trial measured again, remove only its result.json"
        )


def _refuse_foreign(spec: TrialSpec, trial: TrialFolder, sweep: Sweep) -> None:
    """Refuse a trial that trained something else than the sweep does: measurements of the two could not be compared."""
    of_trial = (spec.workload, spec.cluster, _without_text(spec.program), spec.seed)
    of_sweep = (sweep.workload, sweep.cluster, _without_text(sweep.program), sweep.seed)
    if of_trial != of_sweep:
        lines = [
            line
            for key, mine, theirs in zip(IDENTITY, of_trial, of_sweep, strict=True)
            for line in differences(to_data(mine), to_data(theirs), key)
        ]
        raise InputError(
            f"{trial.spec}: this trial belongs to another sweep; different: {'; '.join(lines[:5])}. Move the folder of "
            "the foreign trial away, or give this sweep another name, or another folder with --results"
        )


def _without_text(program: Program) -> Program:
    """A program without the text of its recipe file, which only trials record."""
    return replace(program, text="") if isinstance(program, BridgeRecipe) else program
