"""The interface of all that shows a running sweep: the terminal, MLflow, Optuna's study, the status file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.sweep.progress import Progress
from tuner.sweep.state import RunningTrial, SweepState
from tuner.trial.contract import Heartbeat
from tuner.trial.finished import FinishedTrial

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sweep at one moment."""

    state: SweepState
    progress: Progress


class Sink:
    """Shows a sweep somewhere. Every method does nothing unless a subclass says otherwise.

    The trial folders are the truth, so a sink may miss any call and is rebuilt from them. A method does not wait for
    anything slow, and raises only what must end the sweep.
    """

    def opened(self, snapshot: Snapshot, table: "pd.DataFrame") -> None:
        """The sweep begins, goes on after an end, or begins its refinement; `table` holds its rows from now on."""

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        """An attempt at a trial begins."""

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """A running trial gave a sign of life."""

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """A trial is over; it ruled out `pruned` rows."""

    def halted(self, snapshot: Snapshot, request: str) -> None:
        """The sweep has taken the request with this id; `snapshot.state.halt` is what it led to."""

    def closed(self, reason: str) -> None:
        """The sweep ends; `reason` says why in words."""
