"""megatune replay: runs a trial again, from its folder or from its MLflow run alone, and compares the results.

A trial may come from somebody else, and its program is whatever its spec names. So the user sees and allows the program
before it runs, unless it is megatune's own.
"""

import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.common import AsJson, print_json, stderr, stdout
from tuner.cli.single import run_single
from tuner.errors import InputError
from tuner.files import make_folder, read_json, refuse_unsafe_entries, write_text
from tuner.trial.contract import Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.program import BridgeRecipe
from tuner.trial.replay import Comparison, compare, own_program

NOT_REPRODUCED = 3
"""The exit code if the trial had another outcome or another speed."""


def replay(
    trial: Annotated[
        str, typer.Argument(metavar="TRIAL", help="The trial's folder, or the id of its MLflow run.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where to keep the rerun's files; they are deleted if not given."),
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option("--uri", help="The MLflow tracking URI of the run; by default MLFLOW_TRACKING_URI."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Run the trial's own program without asking, as in a script.")
    ] = False,
    json: AsJson = False,
) -> int:
    """Run a trial again from its own spec, and compare. Exit code 0 if outcome and speed are the same, 3 if not.

    A trial that runs a recipe or a command runs it as you. Both are shown first, and you are asked; without a terminal,
    --yes allows them.
    """
    with tempfile.TemporaryDirectory(prefix="megatune-") as name:
        scratch = Path(name)
        is_folder = Path(trial).is_dir()
        recorded = TrialFolder(Path(trial) if is_folder else _fetch(trial, uri, scratch / "recorded"))
        refuse_unsafe_entries(recorded.path)
        spec, before = read_json(TrialSpec, recorded.spec), read_json(TrialResult, recorded.result)
        target = TrialFolder(folder or scratch / "rerun")
        if target.path.absolute() == recorded.path.absolute():
            raise InputError(f"{target.path}: holds the trial itself; name another folder for its rerun")
        if not _is_allowed(spec, target, yes):
            stderr.print("not run", markup=False)
            return 130
        after = _rerun(spec, target)
    if after.outcome is Outcome.INTERRUPTED:
        return 130
    comparison = compare(before, after)
    if json:
        print_json(
            {**asdict(comparison), "reproduced": comparison.reproduced, "outcome": after.outcome.value}
        )
    else:
        _print(spec, before, after, comparison)
    return 0 if comparison.reproduced else NOT_REPRODUCED


def _is_allowed(spec: TrialSpec, target: TrialFolder, yes: bool) -> bool:
    """Show what a trial runs, and return whether the user allows it; megatune's own program is always allowed.

    Raises:
        InputError: if there is no terminal to ask on.
    """
    lines = own_program(spec)
    if not lines:
        return True
    if isinstance(spec.program, BridgeRecipe) and spec.program.text:
        # No name that Python would import: the folder is the job's working directory.
        path = target.path / "recipe.txt"
        make_folder(target.path)
        write_text(path, spec.program.text)
        lines = [*lines, f"the text of that file, to be read before: {path}"]
    stderr.print(f"trial t{spec.number:04d} of {spec.sweep} runs as you, with your files:", markup=False)
    for line in lines:
        stderr.print(f"  {line}", markup=False)
    if yes:
        return True
    if not (sys.stdin and sys.stdin.isatty() and stderr.is_terminal):
        raise InputError("there is no terminal to ask on whether to run this: allow it with --yes")
    stderr.print("Run it? [y/N] ", markup=False, end="")
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _rerun(spec: TrialSpec, target: TrialFolder) -> TrialResult:
    """Run a trial again in the folder `target`, and return its new result."""
    from launchers.local.torchrun import TorchrunLauncher
    from launchers.machine.detect import check_machine

    # The bound for giving up came from the state of the sweep; the rerun measures every step.
    whole_spec = replace(spec, attempt=1, give_up_above_ms=None)
    check_machine(spec.cluster)
    launcher = TorchrunLauncher()
    plan = launcher.plan(whole_spec, target)
    target.path.mkdir(parents=True, exist_ok=True)
    return run_single(launcher, plan, number=spec.number, layout=spec.layout)


def _fetch(run_id: str, uri: str | None, into: Path) -> Path:
    """Download the spec and the result of a trial from its MLflow run into the folder `into`, and return the folder.

    Raises:
        InputError: if no MLflow is known, its URI on the command line holds a password, or it has no such run.
    """
    from tuner.sweep.tracking_uri import refuse_password
    from tuner.tracking.connection import connect
    from tuner.tracking.memory import bounded_memory
    from tuner.tracking.uri import reason

    refuse_password(uri, "--uri")
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen is None:
        raise InputError(
            f"{run_id}: there is no such folder; if it is the id of an MLflow run, name its tracking URI with --uri"
        )
    try:
        into.mkdir()
        with bounded_memory():
            client = connect(chosen)
            for name in ("spec.json", "result.json"):
                client.download_artifacts(run_id, name, str(into))
    # A wrong URI, or a server that is down, raises errors of SQLAlchemy, of requests and of imports as well.
    except Exception as error:
        raise InputError(
            f"{run_id}: neither a folder nor the run of a trial in MLflow: {reason(error, chosen)}"
        ) from None
    return into


def _print(spec: TrialSpec, before: TrialResult, after: TrialResult, comparison: Comparison) -> None:
    stdout.print(f"trial t{spec.number:04d} of {spec.sweep}: {spec.layout.label()}", markup=False)
    stdout.print(f"  outcome: {before.outcome}, now {after.outcome}", markup=False)
    if after.outcome is not Outcome.COMPLETED:
        stdout.print(f"  now: {after.reason}", markup=False, soft_wrap=True)
    for figure in comparison.figures:
        stdout.print(f"  {figure.name}: {figure.before:,.4g}, now {figure.after:,.4g} ({figure.change:+.1%})")
    if comparison.same_speed is not None:
        stdout.print(
            f"  the 95% intervals of the step time {'overlap' if comparison.same_speed else 'are apart'}"
        )
    if comparison.loss_difference is not None:
        stdout.print(f"  the relative difference of the losses is at most {comparison.loss_difference:.2g}")
    for name, (old, new) in comparison.versions.items():
        stdout.print(f"  {name}: {old}, now {new}", markup=False)
