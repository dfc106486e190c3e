"""Writes one self-contained HTML page about a sweep: its summary, two plots, and a table of all trials."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import pandas as pd

from tuner.report.table import trial_table
from tuner.trial.finished import FinishedTrial, completed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STYLE: Final = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;font-size:small}"
    "td,th{padding:.2em .6em;border:1px solid #ccc}.table{overflow-x:auto}"
)


def html_page(trials: Sequence[FinishedTrial], sweep: str, summary_text: str) -> str:
    """Return the text of an HTML page about a sweep.

    The page has the summary, a plot of throughput by trial, a plot of throughput against memory, and a table of all
    trials. It includes plotly.js (about 5 MB), so that it can be opened without a network.

    Args:
        trials: The finished trials of the sweep.
        sweep: The name of the sweep.
        summary_text: The sweep's summary in Markdown.
    """
    table = trial_table(trials).drop(columns=["finished_at"])
    plots = [_history(trials), _throughput_against_memory(trials)] if completed(trials) else []
    title = html.escape(sweep)
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1><pre>{html.escape(summary_text)}</pre>",
            *(plot.to_html(full_html=False, include_plotlyjs=place == 0) for place, plot in enumerate(plots)),
            '<h2>Every trial</h2><div class="table">',
            table.to_html(index=False, na_rep=""),
            "</div></body></html>",
        ]
    )


def _history(trials: Sequence[FinishedTrial]) -> "Figure":
    from plotly import graph_objects as go

    measured = sorted(completed(trials), key=lambda pair: pair[0].number)
    numbers = [trial.number for trial, _ in measured]
    throughput = [metrics.tokens_per_s_per_gpu for _, metrics in measured]
    failed = [trial for trial in trials if trial.result.metrics is None]
    figure = go.Figure()
    figure.add_scatter(
        x=numbers,
        y=throughput,
        mode="markers",
        name="completed",
        text=[html.escape(f"{trial.source}: {trial.layout.label()}") for trial, _ in measured],
    )
    best_so_far = pd.Series(throughput).cummax().tolist()
    figure.add_scatter(x=numbers, y=best_so_far, mode="lines", line={"shape": "hv"}, name="best so far")
    figure.add_scatter(
        x=[trial.number for trial in failed],
        y=[0.0] * len(failed),
        mode="markers",
        marker={"symbol": "x"},
        name="failed (no throughput)",
        text=[html.escape(f"{trial.result.outcome.value}: {trial.layout.label()}") for trial in failed],
    )
    figure.update_layout(title="History", xaxis_title="trial", yaxis_title="tokens/s/GPU")
    return figure


def _throughput_against_memory(trials: Sequence[FinishedTrial]) -> "Figure":
    from plotly import graph_objects as go

    measured = completed(trials)
    figure = go.Figure()
    for source in dict.fromkeys(trial.source for trial, _ in measured):
        of_source = [(trial, metrics) for trial, metrics in measured if trial.source == source]
        figure.add_scatter(
            x=[metrics.peak_allocated_gib for _, metrics in of_source],
            y=[metrics.tokens_per_s_per_gpu for _, metrics in of_source],
            mode="markers",
            name=html.escape(source),
            text=[html.escape(f"t{trial.number:04d} {trial.layout.label()}") for trial, _ in of_source],
        )
    figure.update_layout(
        title="Throughput against memory", xaxis_title="peak allocated, GiB", yaxis_title="tokens/s/GPU"
    )
    return figure
