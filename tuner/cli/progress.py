"""The sweep while it runs: a live line on a terminal, one plain line a trial anywhere else."""

import time
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from tuner.core.layout import Layout
from tuner.trial.contract import Heartbeat
from tuner.trial.finished import FinishedTrial, TrialSource

if TYPE_CHECKING:
    from tuner.sweep.loop import Progress


NEAR: Final = 0.05
"""How near to the best of all is told while the sweep runs: a share of the step time."""


def duration(seconds: float) -> str:
    """A span of time as a glance takes it: `45s`, `7m05s`, `3h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def standing(progress: "Progress") -> str:
    """Trials done of how many, best so far, time and budget left."""
    parts = [f"{progress.finished}/{progress.budget} trials"]
    if progress.stage is not None:
        parts.append(f"stage {progress.stage} of 2")
    if progress.best is not None and progress.best.result.metrics is not None:
        metrics = progress.best.result.metrics
        parts.append(
            f"best {metrics.step_time_ms:,.1f} ms (trial {progress.best.number}: {progress.best.layout.label()})"
        )
    if progress.pruned:
        parts.append(f"{progress.pruned} ruled out by memory")
    if progress.certainty is not None:
        best_of = "the best" if progress.stage is None else f"the best of {progress.certainty.searched}"
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
    """One line about an ended trial."""
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
    """Why a trial runs, as a line names it."""
    return f"{origin.source}, stage 2" if origin.around else origin.source


class PlainProgress:
    """One line a trial, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def started(
        self, number: int, attempt: int, layout: Layout, origin: TrialSource, progress: "Progress"
    ) -> None:
        """Says only that a trial is tried again."""
        if attempt > 1:
            self._console.print(f"trial {number}: attempt {attempt}", markup=False)

    def waiting_for(self, layout: Layout) -> None:
        """Nothing: the trial's line comes at its end."""

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """Nothing: a log wants no heartbeats."""

    def finished(self, row: FinishedTrial, pruned: int, progress: "Progress") -> None:
        """The trial's line, and where the sweep stands."""
        self._console.print(outcome_line(row, pruned), markup=False)
        self._console.print(f"    {standing(progress)}", markup=False)


class LiveProgress(PlainProgress):
    """The same lines, and below them a live one about the running trial."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._head, self._phase, self._standing, self._since = "", "", "", time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def started(
        self, number: int, attempt: int, layout: Layout, origin: TrialSource, progress: "Progress"
    ) -> None:
        """A trial begins."""
        super().started(number, attempt, layout, origin, progress)
        self.waiting_for(layout)
        self._head, self._standing = f"trial {number} [{_shown(origin)}] {layout.label()}", standing(progress)

    def waiting_for(self, layout: Layout) -> None:
        """One layout runs."""
        self._head, self._phase, self._since = layout.label(), "starting", time.monotonic()

    def heartbeat(self, number: int, heartbeat: Heartbeat) -> None:
        """The running trial's phase and step."""
        self._phase = f"{heartbeat.phase}, step {heartbeat.step}"

    def finished(self, row: FinishedTrial, pruned: int, progress: "Progress") -> None:
        """The trial's line goes above the live one."""
        self._standing = standing(progress)
        self._console.print(outcome_line(row, pruned), markup=False)

    def _render(self) -> Text:
        elapsed = duration(time.monotonic() - self._since)
        return Text.from_markup(
            f"[bold]{escape(self._head)}[/] {escape(self._phase)} ({elapsed})\n[dim]{escape(self._standing)}[/]"
        )
