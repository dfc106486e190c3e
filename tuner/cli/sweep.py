"""megatune sweep: measure layouts until the budget is used, and say which is best."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tuner.cli.common import ResultsRoot, SweepPath, load, prepare, stderr, stdout
from tuner.cli.export import override
from tuner.cli.progress import LiveProgress, PlainProgress
from tuner.cli.signals import stop_on_signals
from tuner.errors import CircuitBreakerError, NothingFeasibleError
from tuner.export import Format
from tuner.files import write_json, write_text
from tuner.report import TrialRow, best, figures, summary, terminal_table
from tuner.results import SweepFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from launchers.base import Launcher
    from tuner.calibration import Calibration
    from tuner.layout import Layout
    from tuner.report import TrialSource
    from tuner.search.stopping import Certainty
    from tuner.sweep import Stop
    from tuner.sweep_file import Sweep
    from tuner.tracking import Status


_STATUS: Mapping[str, "Status"] = {"INTERRUPTED": "KILLED", "BREAKER": "FAILED"}
"""MLflow's status of a sweep that ended for this reason; any other is FINISHED."""


def sweep(
    sweep_file: SweepPath,
    results: ResultsRoot = Path("results"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the first trial's plan; start nothing.")
    ] = False,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Start every trial anew instead of forking it from a loaded process."),
    ] = False,
) -> int:
    """Run the sweep, or go on with it: the same command resumes after any end."""
    from launchers.detect import check_machine
    from launchers.preloaded import Preload
    from launchers.torchrun import TorchrunLauncher
    from tuner.sweep import trial_spec

    loaded = load(sweep_file)
    config = loaded.sweep
    prepared = prepare(loaded, sweep_file)
    table, queue = prepared.table, prepared.queue
    folder = SweepFolder(results / config.name)
    # Also refuses what this launcher cannot run, before anything is written.
    first = TorchrunLauncher().plan(trial_spec(config, 0, 1, queue[0][0]), folder.trial(0))
    if dry_run:
        stdout.print(first.shell_command(), markup=False, soft_wrap=True)
        return 0
    check_machine(config.cluster)
    folder.claim(config)
    with folder.lock(), Preload(folder.path) as preload:
        launcher = TorchrunLauncher() if cold else TorchrunLauncher(start=preload.start)
        return _run(config, table, queue, folder, launcher, sweep_file)


def _run(
    config: "Sweep",
    table: "pd.DataFrame",
    queue: "Sequence[tuple[Layout, TrialSource]]",
    folder: SweepFolder,
    launcher: "Launcher",
    sweep_file: Path,
) -> int:
    from launchers.base import end_marked
    from tuner.sweep import SweepLoop
    from tuner.tracking import Tracker

    end_marked(str(folder.path.absolute()), grace_s=10.0)  # what a killed tuner left running
    tracker = Tracker.open(folder.path, config.tracking.uri, config.experiment, config.name, {})
    observer = LiveProgress(stderr) if stderr.is_terminal else PlainProgress(stderr)
    calibration = _calibration(config, folder)
    loop = SweepLoop(config, table, queue, folder, launcher, tracker, observer, calibration)
    stderr.print(
        f"{config.name}: {len(table):,} layouts to choose from, {len(loop.rows)} trials done, results in {folder.path}"
        + (
            f", step times predicted from the calibration of {calibration.measured_at}" if calibration else ""
        ),
        markup=False,
    )
    with stop_on_signals() as stop, observer:
        reason = loop.run(stop)
    rows = loop.rows
    ended = _sentence(reason, loop.progress().certainty, config.budget.confidence)
    text = summary(rows, config.name, ended, _next_commands(folder, sweep_file))
    write_text(folder.path / "summary.md", text)
    tracker.finish(text, _STATUS.get(reason.name, "FINISHED"))
    _print_end(config, rows, folder, ended, sweep_file)
    return _exit_code(reason, rows, folder)


def _calibration(config: "Sweep", folder: SweepFolder) -> "Calibration | None":
    """This machine's as it was when the sweep began: a later one would rank its trials by another measure."""
    from launchers.calibrate import load_calibration

    if not folder.trial(0).spec.exists() and (found := load_calibration(config.cluster)) is not None:
        write_json(folder.calibration, found)
    return folder.read_calibration()


def _exit_code(reason: "Stop", rows: list[TrialRow], folder: SweepFolder) -> int:
    from tuner.sweep import FAILURES_TO_STOP, Stop

    if reason is Stop.INTERRUPTED:
        return 130
    if reason is Stop.BREAKER:
        raise CircuitBreakerError(
            f"{FAILURES_TO_STOP} infrastructure failures in a row: the machine keeps failing, not the layouts. "
            f"The last one's logs are in {folder.trials}; `megatune doctor` looks at the machine; "
            "the same command goes on"
        )
    if best(rows) is None:
        raise NothingFeasibleError(
            f"{len(rows)} trials ran, none gave a measured layout; `megatune show {folder.path}` says why each failed"
        )
    return 0


def _sentence(reason: "Stop", certainty: "Certainty | None", confidence: float) -> str:
    from tuner.sweep import Stop

    finished = reason not in (Stop.INTERRUPTED, Stop.BREAKER)
    ended = f"{'Finished' if finished else 'Stopped early'}: {reason.value}."
    return ended if certainty is None else f"{ended} {certainty.sentence(confidence)}"


def _next_commands(folder: SweepFolder, sweep_file: Path) -> dict[str, str]:
    path = shlex.quote(str(folder.path))
    again = f"megatune sweep {shlex.quote(str(sweep_file))}"
    if folder.path.parent != Path("results"):
        again += f" --results {shlex.quote(str(folder.path.parent))}"
    return {
        "The override, ready to paste": f"megatune export {path} --format bridge-cli",
        "Every trial": f"megatune show {path}",
        "Compare the trials in MLflow": f"megatune ui {path}",
        "Go on with more trials (raise budget.trials, or lower budget.min_gain, first)": again,
    }


def _print_end(
    config: "Sweep", rows: list[TrialRow], folder: SweepFolder, ended: str, sweep_file: Path
) -> None:
    stdout.print(terminal_table(rows, f"{config.name}: {ended}"))
    facts = figures(rows)
    if facts is not None:
        stdout.print(f"\n[bold]Best layout[/] (trial {facts.trial})", soft_wrap=True)
        stdout.print(override(folder, rows, Format.BRIDGE_CLI), markup=False, soft_wrap=True)
    for purpose, command in _next_commands(folder, sweep_file).items():
        stdout.print(f"{purpose}:\n    [bold]{escape(command)}[/]", soft_wrap=True)
