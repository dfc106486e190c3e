"""Running a sweep on this machine: puts launchers, MLflow and the controller together, for commands and for Python."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tuner.errors import placed
from tuner.files import write_json, write_text
from tuner.report.summary import summary, time_shares
from tuner.sweep.budget import Stop, is_finished
from tuner.sweep.configuration import Sweep
from tuner.sweep.deadline import KeptDeadline
from tuner.sweep.folder import SweepFolder
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    from tuner.cli.planning import Prepared
    from tuner.predict.calibration import Calibration
    from tuner.search.stopping import Certainty
    from tuner.sweep.controller import Controller
    from tuner.sweep.runner import Runner
    from tuner.sweep.sinks import Sink
    from tuner.tracking.spool import Status

NEAR: Final = 0.05
"""The share of the step time within which certainty is told while a sweep runs. Assumed to be what people care for."""

_MLFLOW_STATUS: Final[Mapping[str, "Status"]] = {"INTERRUPTED": "KILLED", "BREAKER": "FAILED"}
"""MLflow's status of a sweep, by the name of the reason why it ended; FINISHED for any other reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepEnd:
    """How a run of a sweep ended."""

    reason: Stop
    trials: tuple[FinishedTrial, ...]
    """The finished trials of all runs of the sweep, by number."""
    sentence: str
    """A text: why the sweep ended, how sure its best layout is, and what to know about its finals."""
    shares: str
    """A sentence that says where the time went."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepStart:
    """What a run of a sweep begins with."""

    trials: int
    """Finished trials of earlier runs."""
    calibration: "Calibration | None"
    """The calibration that predicted step times rest on; None if this machine was not calibrated."""


def run_sweep(
    sweep: Sweep,
    prepared: "Prepared",
    folder: SweepFolder,
    *,
    stop: threading.Event,
    sinks: Sequence["Sink"] = (),
    cold: bool = False,
    deadline: KeptDeadline | None = None,
    commands: Callable[[Stop], Mapping[str, str]] = lambda reason: {},
    on_start: Callable[[SweepStart], None] = lambda start: None,
    on_end: Callable[[SweepEnd], None] = lambda end: None,
) -> SweepEnd:
    """Run a sweep on this machine, or go on with it, until it ends.

    Args:
        sweep: What to measure.
        prepared: The sweep's table of layouts, and the layouts that run first.
        folder: The results folder.
        stop: Set to end the running trials and the sweep.
        sinks: The sinks that are told, besides MLflow, Optuna's study and the status file.
        cold: Start each trial's processes anew, instead of forking them from a loaded process.
        deadline: When the last trial should have ended. The folder keeps it; None leaves a kept one as it is, and
            ignores it.
        commands: Returns the commands that the summary names, by purpose, for the reason why the sweep ended.
        on_start: Called once the folder is claimed and read, before the first trial.
        on_end: Called when the last trial has ended, before MLflow is given time to take the rest.

    Raises:
        InputError: if the machine cannot run the sweep, or the folder cannot be used.
        OSError: if the folder cannot be written at the start, as on a full disk. Once the sweep runs, that counts as a
            failure of the machine, and trials are tried again.
    """
    from launchers.local.fork_client import Preload
    from launchers.local.torchrun import TorchrunLauncher
    from launchers.machine.detect import check_machine
    from launchers.machine.identity import measuring_machine
    from launchers.processes import end_marked
    from launchers.tracking import Tracker
    from tuner.sweep.runner import ThreadRunner

    check_machine(sweep.cluster)
    with (
        placed(folder.path),
        folder.claimed(sweep, measuring_machine(sweep.cluster)) as check_claim,
        Preload(folder.path) as preload,
        Tracker.open(folder.path, sweep.tracking.uri) as tracker,
    ):
        if deadline is not None and folder.read_deadline() != deadline:
            write_json(folder.deadline, deadline)
        end_marked(str(folder.path.absolute()), grace_s=10.0)  # what a killed tuner left running
        launcher = TorchrunLauncher() if cold else TorchrunLauncher(start=preload.start)
        with ThreadRunner(launcher, stop) as runner:
            controller = _controller(
                sweep,
                prepared,
                folder,
                runner=runner,
                stop=stop,
                sinks=(tracker, *sinks),
                deadline_s=None if deadline is None else deadline.instant.timestamp(),
                check_claim=check_claim,
            )
            calibration = controller.search.calibration
            on_start(SweepStart(trials=len(controller.state.ended), calibration=calibration))
            reason = controller.run()
        end = _end(controller, reason)
        text = summary(end.trials, sweep.name, end.sentence, commands(reason), end.shares)
        _write_summary(folder, text)
        on_end(end)
        tracker.finish(text, _MLFLOW_STATUS.get(reason.name, "FINISHED"))
    return end


def _controller(
    sweep: Sweep,
    prepared: "Prepared",
    folder: SweepFolder,
    *,
    runner: "Runner",
    stop: threading.Event,
    sinks: Sequence["Sink"],
    deadline_s: float | None,
    check_claim: Callable[[], None],
) -> "Controller":
    """Return the controller of a claimed folder, which also keeps Optuna's study and the status file."""
    from tuner.sweep.controller import resumed
    from tuner.sweep.status import StatusFile
    from tuner.sweep.study import StudyProjection

    status = StatusFile(folder, world_size=sweep.cluster.world_size, near=NEAR, deadline_s=deadline_s)
    return resumed(
        sweep,
        table=prepared.table,
        queue=prepared.queue,
        folder=folder,
        runner=runner,
        stop=stop,
        sinks=(StudyProjection(folder.study, sweep.name), status, *sinks),
        calibration=_calibration(sweep, folder),
        deadline_s=deadline_s,
        check_claim=check_claim,
    )


def _write_summary(folder: SweepFolder, text: str) -> None:
    """Write the summary; a failure is only a warning, since the summary can be read elsewhere."""
    path = folder.path / "summary.md"
    try:
        write_text(path, text)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s: cannot be written (%s); `megatune show` says the same", path, error
        )


def end_sentence(reason: Stop, certainty: "Certainty | None", confidence: float) -> str:
    """Why a sweep ended, and how near its best is to the best of all with the probability `confidence`."""
    ended = f"{'Finished' if is_finished(reason) else 'Stopped early'}: {reason.value}."
    return ended if certainty is None else f"{ended} {certainty.sentence(confidence)}"


def _end(controller: "Controller", reason: Stop) -> SweepEnd:
    progress, trials = controller.progress(), controller.state.ended
    sentence = end_sentence(reason, progress.certainty, controller.sweep.budget.confidence)
    note = controller.finals_note()
    if reason is Stop.BREAKER:
        note = f"The last one: {controller.state.last_failure}."
    return SweepEnd(
        reason=reason,
        trials=trials,
        sentence=sentence if note is None else f"{sentence} {note}",
        shares=time_shares(trials, progress.own_s, progress.run_s),
    )


def _calibration(sweep: Sweep, folder: SweepFolder) -> "Calibration | None":
    """The calibration that this machine had when the sweep began; a later one would rank by another measure."""
    from launchers.machine.calibrate import load_calibration

    if not folder.trial(0).spec.exists():
        calibration = load_calibration(sweep.cluster)
        if calibration is not None:
            write_json(folder.calibration, calibration)
    return folder.read_calibration()
