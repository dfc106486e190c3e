"""megatune sweep: measure layouts until the budget is used, and say which is best."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tuner.analysis.figures import best_trial, figures
from tuner.analysis.verdict import verdict
from tuner.cli.common import Gpus, OnCluster, Prepared, RecipeName, ResultsRoot, load, prepare, stderr, stdout
from tuner.cli.export import override
from tuner.cli.init import recipe_name, recipe_sweep
from tuner.cli.progress import NEAR, LiveProgress, PlainProgress
from tuner.cli.signals import stop_on_signals
from tuner.errors import CircuitBreakerError, InputError, NothingFeasibleError
from tuner.files import make_folder, write_json, write_text
from tuner.report.summary import summary, time_shares
from tuner.report.terminal import terminal_table
from tuner.sweep.budget import Stop, deadline_of, is_finished
from tuner.sweep.folder import SweepFolder
from tuner.sweep.state import FAILURES_TO_STOP
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launchers.tracking import Tracker
    from tuner.cli.common import Loaded
    from tuner.predict.calibration import Calibration
    from tuner.search.stopping import Certainty
    from tuner.sweep.configuration import Sweep
    from tuner.tracking.spool import Status
    from tuner.trial.launcher import Launcher


_STATUS: Mapping[str, "Status"] = {"INTERRUPTED": "KILLED", "BREAKER": "FAILED"}
"""MLflow's status of a sweep that ended for this reason; any other is FINISHED."""


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
        typer.Option(help="End by then, finals included: 07:00 (the next one), or 2026-03-01T07:00."),
    ] = None,
    budget_gpu_hours: Annotated[
        float | None, typer.Option(help="GPU-hours that all trials may take, instead of the file's.")
    ] = None,
    max_trials: Annotated[
        int | None, typer.Option(help="Trials of every kind that may run, instead of the file's.")
    ] = None,
) -> int:
    """Run the sweep, or go on with it: the same command resumes after any end."""
    from launchers.local.fork_client import Preload
    from launchers.local.torchrun import TorchrunLauncher
    from launchers.machine.detect import check_machine
    from launchers.machine.identity import measuring_machine
    from launchers.tracking import Tracker
    from tuner.sweep.specs import trial_spec

    sweep_file = _recipes_file(sweep_file, recipe, gpus, cluster, results)
    until = None if deadline is None else deadline_of(deadline, datetime.now())
    loaded = _load(sweep_file, recipe is not None)
    loaded = replace(loaded, sweep=_limited(loaded.sweep, budget_gpu_hours, max_trials))
    config = loaded.sweep
    prepared = prepare(loaded, sweep_file)
    folder = SweepFolder(results / config.name)
    # Also refuses what this launcher cannot run, before anything is written.
    first = TorchrunLauncher().plan(trial_spec(config, 0, 1, prepared.queue[0].layout), folder.trial(0))
    if dry_run:
        stdout.print(first.shell_command(), markup=False, soft_wrap=True)
        return 0
    check_machine(config.cluster)
    with (
        folder.claimed(config, measuring_machine(config.cluster)),
        Preload(folder.path) as preload,
        Tracker.open(folder.path, config.tracking.uri) as tracker,
    ):
        launcher = TorchrunLauncher() if cold else TorchrunLauncher(start=preload.start)
        return _run(config, prepared, folder, launcher, tracker, sweep_file, until)


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
    if not path.exists():
        make_folder(path.parent)
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{path}: is there already, and says something else than --recipe {recipe} does: go on with it by "
            f"`megatune sweep {path}`, or choose another --results"
        )
    return path


def _load(path: Path, is_recipe: bool) -> "Loaded":
    """As `load`; a recipe that cannot be read leaves no folder behind."""
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
    launcher: "Launcher",
    tracker: "Tracker",
    sweep_file: Path,
    deadline: datetime | None,
) -> int:
    from launchers.processes import end_marked
    from tuner.sweep.controller import resumed
    from tuner.sweep.runner import ThreadRunner
    from tuner.sweep.status import StatusFile
    from tuner.sweep.study import StudyProjection

    end_marked(str(folder.path.absolute()), grace_s=10.0)  # what a killed tuner left running
    observer = LiveProgress(stderr) if stderr.is_terminal else PlainProgress(stderr)
    calibration = _calibration(config, folder)
    deadline_s = None if deadline is None else deadline.timestamp()
    status = StatusFile(folder, world_size=config.cluster.world_size, near=NEAR, deadline_s=deadline_s)
    with stop_on_signals() as stop, ThreadRunner(launcher, stop) as runner:
        controller = resumed(
            config,
            table=prepared.table,
            queue=prepared.queue,
            folder=folder,
            runner=runner,
            stop=stop,
            sinks=(StudyProjection(folder.study, config.name), tracker, status, observer),
            calibration=calibration,
            deadline_s=deadline_s,
        )
        stderr.print(
            f"{config.name}: {len(prepared.table):,} layouts to choose from"
            + (" in the grid, before its refinement" if config.refined else "")
            + f", {len(controller.state.ended)} trials done, results in {folder.path}"
            + (
                f", step times predicted from the calibration of {calibration.measured_at}"
                if calibration
                else ""
            )
            + (f", to end by {deadline:%Y-%m-%d %H:%M}" if deadline else ""),
            markup=False,
        )
        with observer:
            reason = controller.run()
    rows, progress = controller.state.ended, controller.progress()
    ended = _sentence(reason, progress.certainty, config.budget.confidence)
    if (note := controller.finals_note()) is not None:
        ended = f"{ended} {note}"
    shares = time_shares(rows, progress.own_s, progress.run_s)
    commands = _next_commands(folder, sweep_file, is_finished(reason))
    text = summary(rows, config.name, ended, commands, shares)
    write_text(folder.path / "summary.md", text)
    _print_end(rows, folder, f"{config.name}: {ended}", shares, commands)
    tracker.finish(text, _STATUS.get(reason.name, "FINISHED"))
    return _exit_code(reason, rows, folder)


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


def _calibration(config: "Sweep", folder: SweepFolder) -> "Calibration | None":
    """This machine's as it was when the sweep began: a later one would rank its trials by another measure."""
    from launchers.machine.calibrate import load_calibration

    if not folder.trial(0).spec.exists() and (found := load_calibration(config.cluster)) is not None:
        write_json(folder.calibration, found)
    return folder.read_calibration()


def _exit_code(reason: Stop, rows: "Sequence[FinishedTrial]", folder: SweepFolder) -> int:
    if reason is Stop.INTERRUPTED:
        return 130
    if reason is Stop.BREAKER:
        raise CircuitBreakerError(
            f"{FAILURES_TO_STOP} infrastructure failures in a row: the machine keeps failing, not the layouts. "
            f"The last one's logs are in {folder.trials}; `megatune doctor` looks at the machine; "
            "the same command goes on"
        )
    if best_trial(rows) is None:
        raise NothingFeasibleError(
            f"{len(rows)} trials ran, none gave a measured layout; `megatune show {folder.path}` says why each failed"
        )
    return 0


def _sentence(reason: Stop, certainty: "Certainty | None", confidence: float) -> str:
    ended = f"{'Finished' if is_finished(reason) else 'Stopped early'}: {reason.value}."
    return ended if certainty is None else f"{ended} {certainty.sentence(confidence)}"


def _next_commands(folder: SweepFolder, sweep_file: Path, is_finished: bool) -> dict[str, str]:
    path = shlex.quote(str(folder.path))
    again = f"megatune sweep {shlex.quote(str(sweep_file))}"
    if folder.path.parent != Path("results"):
        again += f" --results {shlex.quote(str(folder.path.parent))}"
    if not is_finished:
        return {
            "Everything measured is kept; go on with": again,
            "What is measured so far": f"megatune show {path}",
        }
    return {
        "The override, ready to paste": f"megatune export {path}",
        "Every trial": f"megatune show {path}",
        "Compare the trials in MLflow": f"megatune ui {path}",
        "Go on with more trials (raise budget.trials, or lower budget.min_gain, first)": again,
    }


def _print_end(
    rows: "Sequence[FinishedTrial]", folder: SweepFolder, title: str, shares: str, commands: Mapping[str, str]
) -> None:
    stdout.print(terminal_table(rows, title))
    for sentence in (shares, *verdict(rows)):
        stdout.print(sentence, markup=False, soft_wrap=True)
    facts = figures(rows)
    if facts is not None:
        stdout.print(f"\n[bold]Best layout[/] (trial {facts.trial})", soft_wrap=True)
        stdout.print(override(folder, rows), markup=False, soft_wrap=True)
    for purpose, command in commands.items():
        stdout.print(f"{purpose}:\n    [bold]{escape(command)}[/]", soft_wrap=True)
