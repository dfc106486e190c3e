"""megatune trial: runs one layout."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.common import AsJson, Knobs, SweepPath, parse_layout, print_json, stdout
from tuner.cli.planning import read_sweep, refuse_invalid
from tuner.cli.progress import outcome_line
from tuner.cli.single import run_single
from tuner.errors import InputError
from tuner.files import to_data, write_json
from tuner.trial.contract import Outcome, TrialFolder
from tuner.trial.finished import FinishedTrial, TrialSource

EXIT_CODES = {Outcome.COMPLETED: 0, Outcome.INTERRUPTED: 130}
"""The exit codes of outcomes; every other outcome gives 3, as nothing feasible ran."""


def trial(
    sweep_file: SweepPath,
    knobs: Knobs,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Where to write its files; by default results/<sweep>/manual/<layout>."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command; start nothing.")] = False,
    json: AsJson = False,
) -> int:
    """Run one layout as one trial outside the sweep. Exit code 0 if it was measured, 3 if not."""
    from launchers.local.torchrun import TorchrunLauncher
    from launchers.machine.detect import check_machine
    from tuner.sweep.specs import trial_spec

    sweep, layout = read_sweep(sweep_file), parse_layout(knobs)
    refuse_invalid(sweep, layout, str(sweep_file))
    name = layout.label().replace(" ", "_").replace(":", "-")
    path = folder or Path("results") / sweep.name / "manual" / name
    target, launcher = TrialFolder(path), TorchrunLauncher()
    plan = launcher.plan(trial_spec(sweep, 0, 1, layout), target)
    if dry_run:
        if json:
            print_json(plan.to_data())
        else:
            stdout.print(plan.shell_command(), markup=False, soft_wrap=True)
        return 0
    check_machine(sweep.cluster)
    _create(target)
    result = run_single(launcher, plan, number=0, layout=layout)
    if json:
        print_json(to_data(result))
    else:
        finished = FinishedTrial(
            number=0,
            source="manual",
            note="",
            layout=layout,
            precision=sweep.workload.precision,
            result=result,
        )
        stdout.print(outcome_line(finished, 0), markup=False, soft_wrap=True)
        stdout.print(f"files: {shlex.quote(str(path))}", markup=False, soft_wrap=True)
    return EXIT_CODES.get(result.outcome, 3)


def _create(folder: TrialFolder) -> None:
    """Make the trial's folder, and note in it that no sweep chose the layout.

    Raises:
        InputError: if the folder cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.source, TrialSource(source="manual"))
    except OSError as error:
        raise InputError(
            f"{folder.path}: cannot be written: {error.strerror or error}; name another folder with --folder"
        ) from None
