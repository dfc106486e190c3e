"""megatune sweep: measure layouts until the budget is used, and say which is best."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tuner.analysis.figures import best_trial, figures
from tuner.analysis.verdict import verdict
from tuner.cli.common import Gpus, OnCluster, RecipeName, ResultsRoot, stderr, stdout
from tuner.cli.export import override
from tuner.cli.init import recipe_name, recipe_sweep
from tuner.cli.planning import Prepared, load, prepare
from tuner.cli.progress import LiveProgress, PlainProgress
from tuner.cli.session import SweepEnd, SweepStart, run_sweep
from tuner.cli.signals import stop_on_signals
from tuner.errors import CircuitBreakerError, InputError, NothingFeasibleError
from tuner.files import make_folder, write_new_text
from tuner.report.terminal import terminal_table
from tuner.sweep.budget import Stop, is_finished
from tuner.sweep.deadline import KeptDeadline, chosen_deadline, next_day
from tuner.sweep.folder import SweepFolder
from tuner.sweep.state import FAILURES_TO_STOP

if TYPE_CHECKING:
    from tuner.cli.planning import Loaded
    from tuner.sweep.configuration import Sweep


def sweep(
    sweep_file: Annotated[
        Path | None, typer.Argument(metavar="[SWEEP.yaml]", help="The sweep file; `init` writes one.")
    ] = None,
    results: ResultsRoot = Path("results"),
    recipe: RecipeName = None,
    gpus: Gpus = None,
    cluster: OnCluster = "detect",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the first trial's plan; start nothing.")
    ] = False,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Start every trial anew instead of forking it from a loaded process."),
    ] = False,
    deadline: Annotated[
        str | None,
        typer.Option(
            help="End by then, finals included: 07:00 (the next one), or 2026-03-01T07:00. It holds until you give "
            "another one."
        ),
    ] = None,
    budget_gpu_hours: Annotated[
        float | None, typer.Option(help="GPU-hours that all trials may take, instead of the file's.")
    ] = None,
    max_trials: Annotated[
        int | None, typer.Option(help="Trials of every kind that may run, instead of the file's.")
    ] = None,
) -> int:
    """Run the sweep, or go on with it: the same command resumes after any end."""
    from launchers.local.torchrun import TorchrunLauncher
    from tuner.sweep.specs import trial_spec

    sweep_file = _recipes_file(sweep_file, recipe, gpus, cluster, results)
    loaded = _load(sweep_file, recipe is not None)
    loaded = replace(loaded, sweep=_limited(loaded.sweep, budget_gpu_hours, max_trials))
    config = loaded.sweep
    prepared = prepare(loaded, sweep_file)
    folder = SweepFolder(results / config.name)
    until = chosen_deadline(deadline, folder.read_deadline(), datetime.now(UTC))
    # `plan` also refuses what this launcher cannot run, before anything is written.
    first = TorchrunLauncher().plan(trial_spec(config, 0, 1, prepared.queue[0].layout), folder.trial(0))
    if dry_run:
        stdout.print(first.shell_command(), markup=False, soft_wrap=True)
        return 0
    return _run(config, prepared, folder, sweep_file, until, cold=cold)


def _recipes_file(
    given: Path | None, recipe: str | None, gpus: int | None, cluster: str, results: Path
) -> Path:
    """The sweep file: the user's, or the one that a recipe stands for, written into its results folder."""
    if recipe is None:
        if given is None:
            raise InputError("give a sweep file, which `megatune init` writes, or --recipe NAME")
        return given
    if given is not None:
        raise InputError(f"{given}: a sweep file and --recipe {recipe}: give one of the two")
    path, text = results / recipe_name(recipe, gpus) / "sweep.yaml", recipe_sweep(recipe, gpus, cluster)
    make_folder(path.parent)
    if not write_new_text(path, text) and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{path}: is there already, and says something else than --recipe {recipe} does: go on with it by "
            f"`megatune sweep {path}`, or choose another --results"
        )
    return path


def _load(path: Path, is_recipe: bool) -> "Loaded":
    """Load a sweep file as `load` does; if a recipe cannot be read, remove the folder that was made for it."""
    try:
        return load(path)
    except InputError:
        if is_recipe and [*path.parent.iterdir()] == [path]:
            path.unlink()
            path.parent.rmdir()
        raise


def _run(
    config: "Sweep",
    prepared: Prepared,
    folder: SweepFolder,
    sweep_file: Path,
    deadline: KeptDeadline | None,
    *,
    cold: bool,
) -> int:
    observer = LiveProgress(stderr) if stderr.is_terminal else PlainProgress(stderr)

    def announce(start: SweepStart) -> None:
        _print_start(config, prepared, folder, start, deadline)

    def show_end(end: SweepEnd) -> None:
        observer.close()
        _print_end(end, folder, f"{config.name}: {end.sentence}", commands(end.reason))

    def commands(reason: Stop) -> dict[str, str]:
        return _next_commands(config, folder, sweep_file, reason, deadline)

    with stop_on_signals() as stop, observer:
        end = run_sweep(
            config,
            prepared,
            folder,
            stop=stop,
            sinks=(observer,),
            cold=cold,
            deadline=deadline,
            commands=commands,
            on_start=announce,
            on_end=show_end,
        )
    return _exit_code(end, folder)


def _print_start(
    config: "Sweep", prepared: Prepared, folder: SweepFolder, start: SweepStart, deadline: KeptDeadline | None
) -> None:
    parts = [
        f"{config.name}: {len(prepared.table):,} layouts to choose from"
        + (" in the grid, before its refinement" if config.refined else ""),
        f"{start.trials} trials done",
        f"results in {folder.path}",
    ]
    if start.calibration is not None:
        disturbed = " (disturbed)" if start.calibration.suspicions else ""
        parts.append(
            f"step times predicted from the calibration of {start.calibration.measured_at}{disturbed}"
        )
    if deadline is not None:
        parts.append(f"to end by {deadline}")
    stderr.print(", ".join(parts), markup=False)
    if deadline is not None and deadline.has_passed(datetime.now(UTC)):
        stderr.print("The deadline of this sweep has passed, so no further trial begins.")


def _limited(config: "Sweep", gpu_hours: float | None, trials: int | None) -> "Sweep":
    """The sweep with the limits of the command line instead of the file's; raises InputError."""
    given = {"gpu_hours": gpu_hours, "trials": trials}
    for name, option in (("gpu_hours", "--budget-gpu-hours"), ("trials", "--max-trials")):
        value = given[name]
        if value is not None and value <= 0:
            raise InputError(f"{option} {value:g}: must be above 0")
    budget = config.budget
    return replace(
        config,
        budget=replace(
            budget,
            gpu_hours=budget.gpu_hours if gpu_hours is None else gpu_hours,
            trials=budget.trials if trials is None else trials,
        ),
    )


def _exit_code(end: SweepEnd, folder: SweepFolder) -> int:
    if end.reason is Stop.INTERRUPTED:
        return 130
    if end.reason is Stop.BREAKER:
        raise CircuitBreakerError(
            f"{FAILURES_TO_STOP} infrastructure failures in a row: the machine keeps failing, or what all trials "
            f"share, not the layouts. The last one's logs are in {folder.trials}; `megatune doctor` looks at the "
            "machine; the same command goes on"
        )
    if best_trial(end.trials) is None:
        raise NothingFeasibleError(
            f"{len(end.trials)} trials ran, none gave a measured layout; `megatune show {folder.path}` says why each "
            "failed"
        )
    return 0


def _again(folder: SweepFolder, sweep_file: Path) -> str:
    """The command that goes on with a sweep."""
    again = f"megatune sweep {shlex.quote(str(sweep_file))}"
    if folder.path.parent != Path("results"):
        again += f" --results {shlex.quote(str(folder.path.parent))}"
    return again


def _next_commands(
    config: "Sweep", folder: SweepFolder, sweep_file: Path, reason: Stop, deadline: KeptDeadline | None
) -> dict[str, str]:
    path, again = shlex.quote(str(folder.path)), _again(folder, sweep_file)
    # `ui` does not take the folder's word for it.
    uri = "" if config.tracking.uri is None else f" --uri {shlex.quote(config.tracking.uri)}"
    if not is_finished(reason):
        return {
            "Everything measured is kept; go on with": again,
            "What is measured so far": f"megatune show {path}",
        }
    purpose = "Go on with more trials (raise budget.trials, or lower budget.min_gain, first)"
    if reason is Stop.DEADLINE and deadline is not None:
        purpose = "Go on until another deadline"
        again += f" --deadline {next_day(deadline, datetime.now(UTC))}"
    return {
        "The override, ready to paste": f"megatune export {path}",
        "Every trial": f"megatune show {path}",
        "Compare the trials in MLflow": f"megatune ui {path}{uri}",
        purpose: again,
    }


def _print_end(end: SweepEnd, folder: SweepFolder, title: str, commands: Mapping[str, str]) -> None:
    stdout.print(terminal_table(end.trials, title))
    for sentence in (end.shares, *verdict(end.trials)):
        stdout.print(sentence, markup=False, soft_wrap=True)
    facts = figures(end.trials)
    if facts is not None:
        stdout.print(f"\n[bold]Best layout[/] (trial {facts.trial})", soft_wrap=True)
        stdout.print(override(folder, end.trials), markup=False, soft_wrap=True)
    for purpose, command in commands.items():
        stdout.print(f"{purpose}:\n    [bold]{escape(command)}[/]", soft_wrap=True)
