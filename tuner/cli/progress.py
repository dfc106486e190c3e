"""Shows a running sweep: by live lines on a terminal, by one plain line per trial anywhere else."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from tuner.cli.session import NEAR
from tuner.core.layout import Layout
from tuner.report.durations import duration
from tuner.sweep.policy import SIDE_BY_SIDE
from tuner.sweep.sinks import Sink, Snapshot
from tuner.sweep.state import RunningTrial
from tuner.trial.contract import Heartbeat
from tuner.trial.finished import FinishedTrial, TrialSource

if TYPE_CHECKING:
    from tuner.sweep.progress import Progress


def standing(progress: "Progress") -> str:
    """Return how many trials are done, of how many, the best so far, and the time used and left, in one line."""
    parts = [f"{progress.finished}/{progress.budget} trials"]
    if progress.part is not None:
        parts.append(f"searching the {progress.part}")
    if progress.best is not None and progress.best.result.metrics is not None:
        metrics = progress.best.result.metrics
        parts.append(
            f"best {metrics.step_time_ms:,.1f} ms (trial {progress.best.number}: {progress.best.layout.label()})"
        )
    if progress.pruned:
        parts.append(f"{progress.pruned} ruled out by memory")
    if progress.certainty is not None:
        best_of = "the best" if progress.part is None else f"the best of {progress.certainty.searched}"
        parts.append(f"{progress.certainty.within(NEAR):.0%} sure to be within {NEAR:.0%} of {best_of}")
    left_s = (
        progress.used_s / progress.finished * (progress.budget - progress.finished)
        if progress.finished
        else None
    )
    if progress.left_s is not None:
        left_s = progress.left_s if left_s is None else min(left_s, progress.left_s)
    parts.append(
        f"{duration(progress.used_s)} used" + ("" if left_s is None else f", about {duration(left_s)} left")
    )
    return " | ".join(parts)


def outcome_line(row: FinishedTrial, pruned: int) -> str:
    """Return one line about an ended trial."""
    metrics = row.result.metrics
    if metrics is None:
        told = f"{row.result.outcome}: {row.result.reason}"
    else:
        half = (metrics.step_time_high_ms - metrics.step_time_low_ms) / 2
        told = (
            f"{metrics.step_time_ms:,.1f} ms (+-{half:,.1f}), {metrics.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, "
            f"peak {metrics.peak_allocated_gib:.3f} GiB"
        )
    ruled_out = f"; rules out {pruned} more" if pruned else ""
    doubt = f"; disturbed: {'; '.join(row.result.suspicions)}" if row.result.suspicions else ""
    took = duration(row.result.durations.total_s)
    return f"trial {row.number} [{_shown(row)}] {row.layout.label()}: {told}{ruled_out}{doubt} ({took})"


def _shown(origin: FinishedTrial | TrialSource) -> str:
    """The reason why a trial runs, in the words of its line."""
    is_refinement = bool(origin.around) and origin.source in SIDE_BY_SIDE
    return f"{origin.source}, refinement" if is_refinement else origin.source


class PlainProgress(Sink):
    """One line per trial, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop showing live lines; a log has none."""

    def waiting_for(self, layout: Layout) -> None:
        """Show that one layout runs, outside a sweep. A log shows nothing: the trial's line comes at its end."""

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        """See Sink. A log says only that a trial is tried again."""
        if trial.attempt > 1:
            self._console.print(f"trial {trial.number}: attempt {trial.attempt}", markup=False)

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """See Sink. Prints the trial's line, and where the sweep stands."""
        self._console.print(outcome_line(trial, pruned), markup=False)
        self._console.print(f"    {standing(snapshot.progress)}", markup=False)

    def halted(self, snapshot: Snapshot, request: str) -> None:
        """See Sink."""
        self._console.print(snapshot.state.halt.value, markup=False)


@dataclass(slots=True)
class _LiveTrial:
    """A running trial as the live view shows it."""

    head: str
    phase: str = "starting"
    since_s: float = field(default_factory=time.monotonic)


class LiveProgress(PlainProgress):
    """Shows the lines of a log, and below them live lines about the running trials."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._running: dict[int, _LiveTrial] = {}
        self._standing = ""
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def close(self) -> None:
        """Take the live lines away."""
        self._live.stop()

    def waiting_for(self, layout: Layout) -> None:
        """See PlainProgress."""
        self._running = {0: _LiveTrial(layout.label())}

    def begun(self, trial: RunningTrial, snapshot: Snapshot) -> None:
        """See Sink."""
        super().begun(trial, snapshot)
        head = f"trial {trial.number} [{_shown(trial.source)}] {trial.layout.label()}"
        self._running[trial.number] = _LiveTrial(head)
        self._standing = standing(snapshot.progress)

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """See Sink."""
        if number in self._running:
            self._running[number].phase = f"{heartbeat.phase}, step {heartbeat.step}"

    def ended(self, trial: FinishedTrial, pruned: int, snapshot: Snapshot) -> None:
        """See Sink. The trial's line goes above the live ones."""
        self._running.pop(trial.number, None)
        self._standing = standing(snapshot.progress)
        self._console.print(outcome_line(trial, pruned), markup=False)

    def _render(self) -> Text:
        now_s = time.monotonic()
        lines = [
            f"[bold]{escape(trial.head)}[/] {escape(trial.phase)} ({duration(now_s - trial.since_s)})"
            for trial in list(self._running.values())
        ]
        return Text.from_markup("\n".join([*lines, f"[dim]{escape(self._standing)}[/]"]))
