"""The trials of one night: what the search measured, and the finals after it."""

from tests.trials import completed_row, failed_row
from tuner.core.layout import Layout
from tuner.trial.contract import Outcome

NIGHT = [
    completed_row(0, 100.0, layout=Layout(tp=8), source="baseline"),
    failed_row(1),
    completed_row(2, 80.0, layout=Layout(tp=2, sp=True), source="seed"),
    completed_row(3, 81.5, layout=Layout(tp=4)),
    failed_row(4, Outcome.TIMEOUT, "over 30 min [bold]see the log[/bold] | a <b>tag</b>"),
    failed_row(5),
]

FINALS = [
    completed_row(10, 82.0, layout=Layout(tp=2, sp=True), source="final"),
    completed_row(11, 80.0, layout=Layout(tp=4), source="final", peak_gib=8.0),
    completed_row(12, 100.0, layout=Layout(tp=8), source="final"),
    completed_row(13, 100.5, layout=Layout(tp=8), source="final"),
    completed_row(14, 80.5, layout=Layout(tp=4), source="final", peak_gib=8.0),
    completed_row(15, 81.0, layout=Layout(tp=2, sp=True), source="final"),
]
