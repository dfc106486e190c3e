"""Runs one planned trial outside a sweep, with its progress on stderr."""

from typing import TYPE_CHECKING

from tuner.cli.common import stderr
from tuner.cli.progress import LiveProgress, PlainProgress
from tuner.cli.signals import stop_on_signals
from tuner.core.layout import Layout
from tuner.trial.contract import TrialResult

if TYPE_CHECKING:
    from tuner.trial.launcher import Launcher, LaunchPlan


def run_single(launcher: "Launcher", plan: "LaunchPlan", *, number: int, layout: Layout) -> TrialResult:
    """Run a planned trial to its end, and return its result; Ctrl-C and SIGTERM end it early."""
    observer = LiveProgress(stderr) if stderr.is_terminal else PlainProgress(stderr)
    with stop_on_signals() as stop, observer:
        observer.waiting_for(layout)
        return launcher.run(plan, stop, lambda beat: observer.heartbeat(number, beat))
