"""megatune show: prints what a sweep has measured so far."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.analysis.answer import Answer, answer
from tuner.analysis.verdict import verdict
from tuner.cli.common import AsJson, ResultsFolder, print_json, results_folder, stderr, stdout
from tuner.cli.pruned import Pruned, print_pruned, pruned_data
from tuner.errors import InputError
from tuner.files import to_data, write_text
from tuner.report.status import status_lines
from tuner.report.terminal import terminal_table
from tuner.sweep.configuration import Sweep
from tuner.sweep.lock import holder_of
from tuner.sweep.status import read_status
from tuner.trial.finished import FinishedTrial, read_trials

if TYPE_CHECKING:
    import pandas as pd


def show(
    results: ResultsFolder,
    pruned: Pruned = False,
    json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write one self-contained HTML page.")
    ] = None,
) -> None:
    """Print the trials of a sweep, running or finished: fastest first, then the failed ones."""
    folder = results_folder(results)
    sweep, trials = folder.sweep(), read_trials(folder.path, with_ranks=json)
    status, holder = read_status(folder), holder_of(folder.lock)
    valid, removed = _pruned(sweep, trials) if pruned else (None, None)
    if html is not None:
        _write_page(html, sweep, trials)
    if json:
        running = {"is_running": holder is not None, "status": None if status is None else to_data(status)}
        removed_data = {} if removed is None else {"pruned": pruned_data(removed)}
        print_json(
            {
                "sweep": sweep.name,
                **_answer_data(trials),
                **running,
                "trials": _trials_data(trials),
                **removed_data,
            }
        )
        return
    for line in status_lines(status, holder) if status is not None else []:
        stdout.print(line, markup=False, soft_wrap=True)
    stdout.print(terminal_table(trials, sweep.name))
    for sentence in verdict(trials):
        stdout.print(sentence, markup=False, soft_wrap=True)
    if removed is not None and valid is not None:
        print_pruned(removed, len(valid))


def _pruned(sweep: Sweep, trials: Sequence[FinishedTrial]) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Return the table that the sweep searches, and its rows that are never launched."""
    from tuner.explain.audit import pruned_rows
    from tuner.search.refinement import searched_table

    valid = searched_table(sweep.problem, trials)
    return valid, pruned_rows(valid, sweep.workload, sweep.cluster, trials)


def _write_page(path: Path, sweep: Sweep, trials: Sequence[FinishedTrial]) -> None:
    from tuner.report.page import html_page
    from tuner.report.summary import summary

    page = html_page(trials, sweep.name, summary(trials, sweep.name, "", {}))
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    stderr.print(f"wrote {path}", markup=False)


def _answer_data(trials: Sequence[FinishedTrial]) -> dict[str, Any]:
    overall = answer(trials)
    return {
        "best": None if overall is None else overall.best.trial.number,
        "tied_with_best": [] if overall is None else [standing.trial.number for standing in overall.tied],
        "finals": _finals_data(overall) if overall and overall.is_final else [],
        "verdict": verdict(trials),
    }


def _finals_data(overall: Answer) -> list[dict[str, Any]]:
    return [
        {
            "layout": to_data(standing.layout),
            "trials": [trial.number for trial in standing.runs],
            "step_time_ms": standing.metrics.step_time_ms,
            "step_time_low_ms": standing.metrics.step_time_low_ms,
            "step_time_high_ms": standing.metrics.step_time_high_ms,
            "over_best": to_data(standing.over_best),
        }
        for standing in overall.ranking
    ]


def _trials_data(trials: Sequence[FinishedTrial]) -> list[dict[str, Any]]:
    return [
        {
            "number": trial.number,
            "source": trial.source,
            "note": trial.note,
            "around": list(trial.around),
            "layout": to_data(trial.layout),
            "result": to_data(trial.result),
        }
        for trial in trials
    ]
