"""megatune export: prints a measured layout as an override for the user's own recipe."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tuner.analysis.figures import figures
from tuner.cli.common import ResultsFolder, results_folder, stderr
from tuner.errors import InputError, NothingFeasibleError
from tuner.files import read_json, write_text
from tuner.report.export import Format
from tuner.report.export import export as write_override
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import TrialSpec
from tuner.trial.finished import FinishedTrial, read_trials


def export(
    results: ResultsFolder,
    format: Annotated[
        Format | None,
        typer.Option("--format", help="What the override is for; by default the program that was measured."),
    ] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", help="Export this trial instead of the best one.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file.")] = None,
) -> None:
    """Print the override that selects the best measured layout, below the evidence for it."""
    folder = results_folder(results)
    text = override(folder, read_trials(folder.path), format, trial)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        write_text(output, text)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
    stderr.print(f"wrote {output}", markup=False)


def override(
    folder: SweepFolder,
    trials: Sequence[FinishedTrial],
    format: Format | None = None,
    number: int | None = None,
) -> str:
    """Return the text of the override that selects the layout of a trial.

    Args:
        folder: the sweep's folder.
        trials: the finished trials of the sweep.
        format: what the override is for; None takes the format of the sweep's program.
        number: the trial's number; None takes the best trial.

    Raises:
        InputError: if the trial with this number did not complete.
        NothingFeasibleError: if no trial completed.
    """
    facts = figures(trials, number)
    if facts is None:
        if number is None:
            raise NothingFeasibleError(f"{folder.path}: no trial completed, so there is nothing to export")
        raise InputError(
            f"--trial {number}: did not complete in {folder.path}; `megatune show` lists those that did"
        )
    trial = folder.trial(facts.trial)
    sweep = folder.sweep()
    # The command in the trial's plan would write over its result.
    command = shlex.join(["megatune", "replay", str(trial.path.absolute())])
    base = sweep.baseline if sweep.recipe else None
    form = Format.of(sweep.program) if format is None else format
    return write_override(form, read_json(TrialSpec, trial.spec), facts, command, recipe_layout=base)
