"""What a sweep found: its trials as a table, on the terminal, as Markdown for the morning, and as HTML."""

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tuner.analysis.answer import Answer, Standing, answer
from tuner.analysis.figures import Figures, figures
from tuner.analysis.verdict import verdict
from tuner.core.layout import KNOBS, Layout
from tuner.frameworks.megatron_fields import megatron_fields
from tuner.trial.contract import Metrics, Outcome
from tuner.trial.finished import FinishedTrial, completed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_SHORT_S = 600
"""Below, a span of time is told in seconds."""


def time_shares(rows: Sequence[FinishedTrial], own_s: float = 0.0, run_s: float = 0.0) -> str:
    """Where the trials' time went, as one sentence.

    Args:
        rows: the finished trials.
        own_s: what the tuner took between the trials of one run.
        run_s: that run's wall clock.
    """
    durations = [row.result.durations for row in rows]
    total_s = sum(one.total_s for one in durations)
    if not total_s:
        return "No trial took any time."
    parts = {
        name: sum(getattr(one, f"{key}_s") for one in durations)
        for name, key in (("start-up", "startup"), ("build", "build"), ("warm-up", "warmup"))
    }
    parts["timed steps"] = sum(one.measure_s for one in durations)
    parts["the rest"] = max(0.0, total_s - sum(parts.values()))
    told = ", ".join(f"{seconds / total_s:.0%} {name}" for name, seconds in parts.items())
    own = (
        f" The tuner's own time between this run's trials: {own_s:.1f} s, {own_s / run_s:.1%}."
        if run_s
        else ""
    )
    span = f"{total_s / 3600:.2f} h" if total_s >= _SHORT_S else f"{total_s:.0f} s"
    return f"Of {span} of trials: {told}.{own}"


def trial_table(rows: Sequence[FinishedTrial]) -> pd.DataFrame:
    """The trials as a table, a row each in the order given: facts, measurements (or NaN), every knob."""
    records = []
    for row in rows:
        result, metrics = row.result, row.result.metrics
        record: dict[str, Any] = {
            "number": row.number,
            "source": row.source,
            "outcome": result.outcome.value,
            "label": row.layout.label(),
            **{name: getattr(metrics, name, None) for name in _MEASURED},
            "total_s": result.durations.total_s,
            "finished_at": result.finished_at,
            "reason": result.reason,
            "note": row.note,
            **{knob: getattr(row.layout, knob) for knob in KNOBS},
        }
        records.append(record)
    columns = [
        "number",
        "source",
        "outcome",
        "label",
        *_MEASURED,
        "total_s",
        "finished_at",
        "reason",
        "note",
        *KNOBS,
    ]
    table = pd.DataFrame(records, columns=columns)
    return table.astype(dict.fromkeys(_MEASURED, float))


_MEASURED = (
    "step_time_ms",
    "step_time_low_ms",
    "step_time_high_ms",
    "tokens_per_s_per_gpu",
    "model_tflops_per_s_per_gpu",
    "mfu",
    "peak_allocated_gib",
    "peak_reserved_gib",
)


def terminal_table(rows: Sequence[FinishedTrial], title: str = "") -> Group:
    """The trials for a terminal of 80 columns and more: finals, search, the failed ones and why.

    Fastest first, the best layout highlighted; the step time's interval is given as the larger of its two arms, in
    percent.
    """
    found = answer(rows)
    finals = found.ranking if found and found.is_final else ()
    tables = [
        _finals_table(finals),
        _completed_table(completed(row for row in rows if row.source != "final"), found),
        _failed_table([row for row in rows if not row.result.metrics]),
    ]
    if finals:
        tables[0].title, tables[1].title = "Finals", "Search"
    return Group(*([Text(title, style="bold")] if title else []), *(table for table in tables if table.rows))


def _measured_table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.add_column(first, no_wrap=True)
    table.add_column("layout", min_width=26)
    for heading in ("step\nms", "95%\ninterval", "tokens/s\n/GPU", "peak\nGiB", "vs\nbest"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _measured_cells(metrics: Metrics) -> tuple[str, str, str, str]:
    step_ms = metrics.step_time_ms
    arm_ms = max(metrics.step_time_high_ms - step_ms, step_ms - metrics.step_time_low_ms)
    return (
        f"{step_ms:,.1f}",
        f"±{arm_ms / step_ms:.1%}",
        f"{metrics.tokens_per_s_per_gpu:,.0f}",
        f"{metrics.peak_allocated_gib:.3g}",
    )


def _finals_table(finals: Sequence[Standing]) -> Table:
    table = _measured_table("runs")
    for standing in finals:
        ratio = standing.over_best
        is_best = standing is finals[0]
        told = f"{ratio.low - 1:+.1%} to {ratio.high - 1:+.1%}"
        numbers = sorted(row.number for row in standing.runs)
        cells = (
            f"{len(numbers)}",
            f"{standing.layout.label()}\n{', '.join(f't{number:04d}' for number in numbers)}",
            *_measured_cells(standing.metrics),
            "best" if is_best else f"{ratio.value - 1:+.1%}\n{'tie' if ratio.is_tie else told}",
        )
        _add(table, cells, style="bold green" if is_best else "")
    return table


def _completed_table(ranked: Sequence[tuple[FinishedTrial, Metrics]], found: Answer | None) -> Table:
    table = _measured_table("trial")
    best_row = found.best.row if found else None
    layout = found.best.layout if found else None
    fastest = next((metrics for row, metrics in ranked if row.layout == layout), None)
    for row, metrics in ranked:
        is_best = row is best_row or (found is not None and found.is_final and row.layout == layout)
        doubt = " (disturbed)" if row.result.suspicions else ""
        out = " (out)" if found and row.layout in found.out else ""
        outliers = f", {len(metrics.outliers)} outliers" if metrics.outliers else ""
        cells = (
            f"t{row.number:04d}\n{row.source}",
            f"{row.layout.label()}\n{row.result.outcome.value}{outliers}{doubt}{out}",
            *_measured_cells(metrics),
            "best"
            if is_best
            else f"{metrics.step_time_ms / fastest.step_time_ms - 1:+.1%}"
            if fastest
            else "",
        )
        _add(table, cells, style="bold green" if is_best else "")
    return table


def _failed_table(failed: Sequence[FinishedTrial]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", "outcome"):
        table.add_column(heading, no_wrap=True)
    for heading in ("layout", "why"):
        table.add_column(heading, overflow="fold")
    for row in failed:
        cells = (
            f"t{row.number:04d}\n{row.source}",
            row.result.outcome.value,
            row.layout.label(),
            row.result.reason,
        )
        _add(table, cells, style="" if row.result.outcome is Outcome.TOO_SLOW else "red")
    return table


def _add(table: Table, cells: Iterable[str], style: str) -> None:
    # Text, not str: a reason with [brackets] is no markup.
    table.add_row(*(Text(cell) for cell in cells), style=style)


def summary(
    rows: Sequence[FinishedTrial], sweep: str, stopped: str, commands: Mapping[str, str], shares: str = ""
) -> str:
    """The morning's summary in Markdown.

    Args:
        rows: the finished trials.
        sweep: the sweep's name.
        stopped: a sentence: whether the sweep finished, and why it stopped.
        commands: what to do next: a short purpose to the command that does it.
        shares: a sentence: where the time went; that of the trials alone if not given.
    """
    lines = [f"# {sweep}", "", stopped, "", _counts(rows), "", shares or time_shares(rows), ""]
    facts, found = figures(rows), answer(rows)
    lines += (
        ["## Best layout", "", *_best_section(found, facts)]
        if facts and found
        else ["## No layout completed", ""]
    )
    lines += [*(f"- {sentence}" for sentence in verdict(rows)), ""]
    lines += _failures(rows)
    if commands:
        lines += ["## Next", ""]
        for purpose, command in commands.items():
            lines += [f"{purpose}:", "", "```", command, "```", ""]
    return "\n".join(lines)


def _counts(rows: Sequence[FinishedTrial]) -> str:
    counts = Counter(row.result.outcome for row in rows)
    hours = sum(row.result.durations.total_s for row in rows) / 3600
    parts = [f"{count} {outcome.value}" for outcome, count in counts.most_common()]
    return f"{len(rows)} trials in {hours:.2f} h of running: {', '.join(parts) or 'none finished'}."


def _best_section(found: Answer, facts: Figures) -> list[str]:
    columns = [("best", found.best)]
    if found.baseline and found.baseline is not found.best:
        columns.append(("baseline", found.baseline))
    measured = [standing.metrics for _, standing in columns]
    cells = {
        "layout": [standing.layout.label() for _, standing in columns],
        "trial": [
            ", ".join(f"t{row.number:04d}" for row in sorted(standing.runs, key=lambda row: row.number))
            for _, standing in columns
        ],
        "step time, ms": [f"{m.step_time_ms:,.1f}" for m in measured],
        "95% interval, ms": [f"{m.step_time_low_ms:,.1f} to {m.step_time_high_ms:,.1f}" for m in measured],
        "timed steps": [f"{len(m.step_times_ms)}" for m in measured],
        "tokens/s/GPU": [f"{m.tokens_per_s_per_gpu:,.1f}" for m in measured],
        "model TFLOP/s/GPU": [f"{m.model_tflops_per_s_per_gpu:.4g}" for m in measured],
        "MFU": ["" if m.mfu is None else f"{m.mfu:.1%}" for m in measured],
        "peak allocated, GiB": [f"{m.peak_allocated_gib:.4g}" for m in measured],
    }
    lines = [_markdown_row(["", *(name for name, _ in columns)]), _markdown_row(["---"] * (1 + len(columns)))]
    lines += [_markdown_row([name, *values]) for name, values in cells.items()]
    settings = megatron_fields(found.best.layout, Layout())
    lines += ["", facts.gain_sentence(), "", facts.certainty_sentence(), ""]
    lines += ["What differs from Megatron's plain defaults:", "", "```"]
    lines += [f"{name} = {value}" for name, value in settings.items()] or ["nothing"]
    return [*lines, "```", ""]


def _failures(rows: Sequence[FinishedTrial]) -> list[str]:
    failed = [row for row in rows if row.result.outcome not in (Outcome.COMPLETED, Outcome.TOO_SLOW)]
    if not failed:
        return []
    lines = ["## Failures by cause", "", "| outcome | trials | first one |", "| --- | --- | --- |"]
    for outcome, count in Counter(row.result.outcome for row in failed).most_common():
        first = next(row for row in failed if row.result.outcome is outcome)
        example = f"t{first.number:04d} {first.layout.label()}: {first.result.reason}"
        lines.append(_markdown_row([outcome.value, str(count), example]))
    return [*lines, ""]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def html_page(rows: Sequence[FinishedTrial], sweep: str, summary_text: str) -> str:
    """One self-contained page: the summary, the history, throughput against memory, and every trial.

    plotly.js (about 5 MB) is inlined once, so that the page opens on a machine without a network.
    """
    table = trial_table(rows).drop(columns=["finished_at"])
    plots = [_history(rows), _throughput_against_memory(rows)] if completed(rows) else []
    parts = [plot.to_html(full_html=False, include_plotlyjs=place == 0) for place, plot in enumerate(plots)]
    title = html.escape(sweep)
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;font-size:small}"
            "td,th{padding:.2em .6em;border:1px solid #ccc}.table{overflow-x:auto}</style></head><body>",
            f"<h1>{title}</h1><pre>{html.escape(summary_text)}</pre>",
            *parts,
            '<h2>Every trial</h2><div class="table">',
            table.to_html(index=False, na_rep=""),
            "</div></body></html>",
        ]
    )


def _history(rows: Sequence[FinishedTrial]) -> "Figure":
    from plotly import graph_objects as go

    measured = sorted(completed(rows), key=lambda pair: pair[0].number)
    numbers = [row.number for row, _ in measured]
    throughput = [metrics.tokens_per_s_per_gpu for _, metrics in measured]
    failed = [row for row in rows if row.result.metrics is None]
    figure = go.Figure()
    figure.add_scatter(
        x=numbers,
        y=throughput,
        mode="markers",
        name="completed",
        text=[html.escape(f"{row.source}: {row.layout.label()}") for row, _ in measured],
    )
    best_so_far = pd.Series(throughput).cummax().tolist()
    figure.add_scatter(x=numbers, y=best_so_far, mode="lines", line={"shape": "hv"}, name="best so far")
    figure.add_scatter(
        x=[row.number for row in failed],
        y=[0.0] * len(failed),
        mode="markers",
        marker={"symbol": "x"},
        name="failed (no throughput)",
        text=[html.escape(f"{row.result.outcome.value}: {row.layout.label()}") for row in failed],
    )
    figure.update_layout(title="History", xaxis_title="trial", yaxis_title="tokens/s/GPU")
    return figure


def _throughput_against_memory(rows: Sequence[FinishedTrial]) -> "Figure":
    from plotly import graph_objects as go

    measured = completed(rows)
    figure = go.Figure()
    for source in dict.fromkeys(row.source for row, _ in measured):
        chosen = [(row, metrics) for row, metrics in measured if row.source == source]
        figure.add_scatter(
            x=[metrics.peak_allocated_gib for _, metrics in chosen],
            y=[metrics.tokens_per_s_per_gpu for _, metrics in chosen],
            mode="markers",
            name=html.escape(source),
            text=[html.escape(f"t{row.number:04d} {row.layout.label()}") for row, _ in chosen],
        )
    figure.update_layout(
        title="Throughput against memory", xaxis_title="peak allocated, GiB", yaxis_title="tokens/s/GPU"
    )
    return figure
