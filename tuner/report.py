"""What a sweep found: its trials as a table, on the terminal, as Markdown for the morning, and as HTML."""

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tuner.errors import InputError
from tuner.export import Comparison, Figures, megatron_fields
from tuner.files import STRICT, read_json
from tuner.layout import KNOBS, Layout
from tuner.trial import Metrics, Outcome, TrialFolder, TrialResult, TrialSpec

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSource:
    """Why the sweep ran a trial; `source.json` in its folder."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: str
    """`baseline`, `seed` or `sampler`; `repeat` of a suspect trial, `canary` for the machine's drift, `final`."""
    note: str = ""
    """Which table a seed comes from, and how it was moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One finished trial of a sweep."""

    number: int
    source: str
    note: str
    layout: Layout
    result: TrialResult


def trial_folder(results: Path, number: int) -> TrialFolder:
    """The folder of a trial in a sweep's results: `trials/t0000`."""
    return TrialFolder(results / "trials" / f"t{number:04d}")


def read_trials(results: Path) -> list[TrialRow]:
    """Read the finished trials of a sweep, by number; a folder without `result.json` is left out.

    Raises:
        InputError: naming the file that is missing beside a result, torn, or of another trial.
    """
    rows = []
    for path in sorted(results.glob("trials/t*")):
        folder = TrialFolder(path)
        if not folder.result.exists():
            continue
        spec = read_json(TrialSpec, folder.spec)
        if trial_folder(results, spec.number).path.name != path.name:
            raise InputError(
                f"{folder.spec}: key 'number' is {spec.number}, but the folder is {path.name}; was it copied?"
            )
        chosen = read_json(TrialSource, folder.source)
        result = read_json(TrialResult, folder.result)
        rows.append(
            TrialRow(
                number=spec.number, source=chosen.source, note=chosen.note, layout=spec.layout, result=result
            )
        )
    return sorted(rows, key=lambda row: row.number)


def completed(rows: Iterable[TrialRow]) -> list[tuple[TrialRow, Metrics]]:
    """The completed trials with what they measured, fastest first; the earlier one where two are equal."""
    measured = [(row, row.result.metrics) for row in rows if row.result.metrics is not None]
    return sorted(measured, key=lambda pair: (pair[1].step_time_ms, pair[0].number))


def best(rows: Iterable[TrialRow]) -> TrialRow | None:
    """The completed trial with the smallest median step time; None where none completed."""
    ranked = completed(rows)
    return ranked[0][0] if ranked else None


def tie(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """The trials that noise cannot tell from the best, itself included, fastest first.

    Two trials tie where their 95% intervals of the median step time overlap.
    """
    ranked = completed(rows)
    return [row for row, metrics in ranked if metrics.step_time_low_ms <= ranked[0][1].step_time_high_ms]


def baseline(rows: Iterable[TrialRow]) -> TrialRow | None:
    """The fastest completed run of the baseline layout: the one that flatters the gain least."""
    return best(row for row in rows if row.source == "baseline")


def figures(rows: Sequence[TrialRow], number: int | None = None) -> Figures | None:
    """The measured facts of a trial (the best one by default) beside its rival and the baseline.

    Returns None where the trial did not complete. The rival is the fastest completed trial of another layout.
    """
    ranked = completed(rows)
    chosen = [pair for pair in ranked if number is None or pair[0].number == number]
    if not chosen:
        return None
    row, metrics = chosen[0]
    rival = next((pair for pair in ranked if pair[0].layout != row.layout), None)
    start = baseline(rows)
    return Figures(
        trial=row.number,
        metrics=metrics,
        rival=_compare(*rival, metrics) if rival else None,
        baseline=_compare(start, start.result.metrics, metrics) if start and start.result.metrics else None,
        versions=row.result.versions,
        device_name=row.result.device_name,
    )


def _compare(other: TrialRow, theirs: Metrics, ours: Metrics) -> Comparison:
    return Comparison(
        trial=other.number,
        label=other.layout.label(),
        ratio=theirs.step_time_ms / ours.step_time_ms,
        ratio_low=theirs.step_time_low_ms / ours.step_time_high_ms,
        ratio_high=theirs.step_time_high_ms / ours.step_time_low_ms,
    )


def trial_table(rows: Sequence[TrialRow]) -> pd.DataFrame:
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


def terminal_table(rows: Sequence[TrialRow], title: str = "") -> Group:
    """The trials for a terminal of 80 columns and more: the completed ones, then the failed ones and why.

    Completed trials stand fastest first, the best one highlighted; the step time's interval is given as the
    larger of its two arms, in percent.
    """
    tables = [
        _completed_table(completed(rows)),
        _failed_table([row for row in rows if not row.result.metrics]),
    ]
    return Group(*([Text(title, style="bold")] if title else []), *(table for table in tables if table.rows))


def _completed_table(ranked: Sequence[tuple[TrialRow, Metrics]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("trial", no_wrap=True)
    table.add_column("layout", min_width=26)
    for heading in ("step\nms", "95%\ninterval", "tokens/s\n/GPU", "peak\nGiB", "vs\nbest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, metrics in ranked:
        step_ms, fastest_ms = metrics.step_time_ms, ranked[0][1].step_time_ms
        arm_ms = max(metrics.step_time_high_ms - step_ms, step_ms - metrics.step_time_low_ms)
        is_best = row is ranked[0][0]
        cells = (
            f"t{row.number:04d}\n{row.source}",
            f"{row.layout.label()}\n{row.result.outcome.value}",
            f"{step_ms:,.1f}",
            f"±{arm_ms / step_ms:.1%}",
            f"{metrics.tokens_per_s_per_gpu:,.0f}",
            f"{metrics.peak_allocated_gib:.3g}",
            "best" if is_best else f"{step_ms / fastest_ms - 1:+.1%}",
        )
        _add(table, cells, style="bold green" if is_best else "")
    return table


def _failed_table(failed: Sequence[TrialRow]) -> Table:
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
        _add(table, cells, style="red")
    return table


def _add(table: Table, cells: Iterable[str], style: str) -> None:
    # Text, not str: a reason with [brackets] is no markup.
    table.add_row(*(Text(cell) for cell in cells), style=style)


def summary(rows: Sequence[TrialRow], sweep: str, stopped: str, commands: Mapping[str, str]) -> str:
    """The morning's summary in Markdown.

    Args:
        rows: the finished trials.
        sweep: the sweep's name.
        stopped: a sentence: whether the sweep finished, and why it stopped.
        commands: what to do next: a short purpose to the command that does it.
    """
    lines = [f"# {sweep}", "", stopped, "", _counts(rows), ""]
    facts = figures(rows)
    lines += ["## Best layout", "", *_best_section(rows, facts)] if facts else ["## No layout completed", ""]
    lines += _failures(rows)
    if commands:
        lines += ["## Next", ""]
        for purpose, command in commands.items():
            lines += [f"{purpose}:", "", "```", command, "```", ""]
    return "\n".join(lines)


def _counts(rows: Sequence[TrialRow]) -> str:
    counts = Counter(row.result.outcome for row in rows)
    hours = sum(row.result.durations.total_s for row in rows) / 3600
    parts = [f"{count} {outcome.value}" for outcome, count in counts.most_common()]
    return f"{len(rows)} trials in {hours:.2f} h of running: {', '.join(parts) or 'none finished'}."


def _best_section(rows: Sequence[TrialRow], facts: Figures) -> list[str]:
    by_number = {row.number: row for row in rows}
    columns = [("best", by_number[facts.trial])]
    if facts.baseline and facts.baseline.trial != facts.trial:
        columns.append(("baseline", by_number[facts.baseline.trial]))
    measured = [row.result.metrics for _, row in columns]
    cells = {
        "layout": [row.layout.label() for _, row in columns],
        "trial": [f"t{row.number:04d}" for _, row in columns],
        "step time, ms": [f"{m.step_time_ms:,.1f}" for m in measured if m],
        "95% interval, ms": [
            f"{m.step_time_low_ms:,.1f} to {m.step_time_high_ms:,.1f}" for m in measured if m
        ],
        "timed steps": [f"{len(m.step_times_ms)}" for m in measured if m],
        "tokens/s/GPU": [f"{m.tokens_per_s_per_gpu:,.1f}" for m in measured if m],
        "model TFLOP/s/GPU": [f"{m.model_tflops_per_s_per_gpu:.4g}" for m in measured if m],
        "MFU": ["" if m.mfu is None else f"{m.mfu:.1%}" for m in measured if m],
        "peak allocated, GiB": [f"{m.peak_allocated_gib:.4g}" for m in measured if m],
    }
    lines = [_markdown_row(["", *(name for name, _ in columns)]), _markdown_row(["---"] * (1 + len(columns)))]
    lines += [_markdown_row([name, *values]) for name, values in cells.items()]
    settings = megatron_fields(by_number[facts.trial].layout, Layout())
    lines += ["", facts.gain_sentence(), "", facts.certainty_sentence(), ""]
    lines += ["What differs from Megatron's plain defaults:", "", "```"]
    lines += [f"{name} = {value}" for name, value in settings.items()] or ["nothing"]
    return [*lines, "```", ""]


def _failures(rows: Sequence[TrialRow]) -> list[str]:
    failed = [row for row in rows if row.result.outcome is not Outcome.COMPLETED]
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


def html_page(rows: Sequence[TrialRow], sweep: str, summary_text: str) -> str:
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


def _history(rows: Sequence[TrialRow]) -> "Figure":
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


def _throughput_against_memory(rows: Sequence[TrialRow]) -> "Figure":
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
