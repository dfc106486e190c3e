"""Makes the tables of a sweep's trials for a terminal: the finals, the search, and the trials without a measurement."""

from collections.abc import Iterable, Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tuner.analysis.answer import Answer, answer
from tuner.analysis.standings import Standing, StepTimeRatio
from tuner.trial.contract import Metrics, Outcome
from tuner.trial.finished import FinishedTrial, completed

BEST_STYLE: Final = "bold green"
FAILED_STYLE: Final = "red"
MOST_ROWS: Final = 100
"""The most rows of one table. Assumed: enough for a night of trials; each row takes a millisecond to lay out."""


def terminal_table(trials: Sequence[FinishedTrial], title: str = "") -> Group:
    """Return tables of trials for a terminal with at least 80 columns.

    Measured trials are sorted by step time, and the best layout is highlighted. If a table would have more than
    MOST_ROWS rows, it shows only the fastest trials, or for trials without a measurement the latest. The 95% interval
    of a step time is shown as the distance of its farther end from the step time, in percent of the step time.

    Args:
        trials: The finished trials of a sweep.
        title: A line above the tables; empty for none.
    """
    ranked = answer(trials)
    finals = ranked.ranking if ranked and ranked.is_final else ()
    searched = completed(trial for trial in trials if trial.source != "final")
    unmeasured = [trial for trial in trials if not trial.result.metrics]
    tables = [
        _finals_table(finals),
        _searched_table(searched, ranked),
        _unmeasured_table(unmeasured[-MOST_ROWS:]),
    ]
    tables[1].caption = _caption("fastest", len(searched))
    tables[2].caption = _caption("latest", len(unmeasured))
    if finals:
        tables[0].title, tables[1].title = "Finals", "Search"
    return Group(*([Text(title, style="bold")] if title else []), *(table for table in tables if table.rows))


def _caption(shown: str, trials: int) -> str | None:
    if trials <= MOST_ROWS:
        return None
    return f"the {shown} {MOST_ROWS} of {trials:,} trials; all of them with --json or --html"


def _finals_table(finals: Sequence[Standing]) -> Table:
    table = _measured_table("runs")
    for standing in finals:
        is_best = standing is finals[0]
        numbers = sorted(run.number for run in standing.runs)
        cells = (
            f"{len(numbers)}",
            f"{standing.layout.label()}\n{', '.join(f't{number:04d}' for number in numbers)}",
            *_measured_cells(standing.metrics),
            "best" if is_best else _ratio_cell(standing.over_best),
        )
        _add_row(table, cells, style=BEST_STYLE if is_best else "")
    return table


def _ratio_cell(ratio: StepTimeRatio) -> str:
    interval = f"{ratio.low - 1:+.1%} to {ratio.high - 1:+.1%}"
    return f"{ratio.value - 1:+.1%}\n{'tie' if ratio.is_tie else interval}"


def _searched_table(measured: Sequence[tuple[FinishedTrial, Metrics]], ranked: Answer | None) -> Table:
    table = _measured_table("trial")
    best = ranked.best if ranked else None
    best_metrics = next(
        (metrics for trial, metrics in measured if best and trial.layout == best.layout), None
    )
    for trial, metrics in measured[:MOST_ROWS]:
        is_best = ranked is not None and (
            trial is ranked.best.trial or (ranked.is_final and trial.layout == ranked.best.layout)
        )
        over_best = metrics.step_time_ms / best_metrics.step_time_ms if best_metrics else None
        cells = (
            f"t{trial.number:04d}\n{trial.source}",
            f"{trial.layout.label()}\n{_remarks(trial, metrics, ranked)}",
            *_measured_cells(metrics),
            "best" if is_best else "" if over_best is None else f"{over_best - 1:+.1%}",
        )
        _add_row(table, cells, style=BEST_STYLE if is_best else "")
    return table


def _remarks(trial: FinishedTrial, metrics: Metrics, ranked: Answer | None) -> str:
    outliers = f", {len(metrics.outliers)} outliers" if metrics.outliers else ""
    disturbed = " (disturbed)" if trial.result.suspicions else ""
    out = " (out)" if ranked and trial.layout in ranked.out else ""
    return f"{trial.result.outcome.value}{outliers}{disturbed}{out}"


def _unmeasured_table(trials: Sequence[FinishedTrial]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", "outcome"):
        table.add_column(heading, no_wrap=True)
    for heading in ("layout", "why"):
        table.add_column(heading, overflow="fold")
    for trial in trials:
        outcome = trial.result.outcome
        cells = (
            f"t{trial.number:04d}\n{trial.source}",
            outcome.value,
            trial.layout.label(),
            trial.result.reason,
        )
        _add_row(table, cells, style="" if outcome is Outcome.TOO_SLOW else FAILED_STYLE)
    return table


def _measured_table(first_heading: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.add_column(first_heading, no_wrap=True)
    table.add_column("layout", min_width=26)
    for heading in ("step\nms", "95%\ninterval", "tokens/s\n/GPU", "peak\nGiB", "vs\nbest"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _measured_cells(metrics: Metrics) -> tuple[str, ...]:
    """Return the cells for the step time, its interval, the throughput and the peak memory."""
    step_ms = metrics.step_time_ms
    arm_ms = max(metrics.step_time_high_ms - step_ms, step_ms - metrics.step_time_low_ms)
    return (
        f"{step_ms:,.1f}",
        f"±{arm_ms / step_ms:.1%}",
        f"{metrics.tokens_per_s_per_gpu:,.0f}",
        f"{metrics.peak_allocated_gib:.3g}",
    )


def _add_row(table: Table, cells: Iterable[str], style: str) -> None:
    # Text is not parsed as markup: a reason may contain [brackets].
    table.add_row(*(Text(cell) for cell in cells), style=style)
