"""megatune show: what a sweep has measured so far."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tuner.analysis.answer import Answer, answer
from tuner.analysis.verdict import verdict
from tuner.cli.common import AsJson, ResultsFolder, print_json, results_folder, stderr, stdout
from tuner.cli.pruned import Pruned, print_pruned, pruned_data
from tuner.errors import InputError
from tuner.files import to_data, write_text
from tuner.report.page import html_page
from tuner.report.status import status_lines
from tuner.report.summary import summary
from tuner.report.terminal import terminal_table
from tuner.search.refinement import searched_table
from tuner.sweep.lock import holder_of
from tuner.sweep.status import read_status
from tuner.trial.finished import read_trials


def show(
    results: ResultsFolder,
    pruned: Pruned = False,
    json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write one self-contained HTML page.")
    ] = None,
) -> None:
    """Print the trials of a sweep, running or finished: fastest first, then the failed ones."""
    from tuner.explain.audit import pruned_rows

    folder = results_folder(results)
    sweep, rows = folder.sweep(), read_trials(folder.path)
    status, holder = read_status(folder), holder_of(folder.lock)
    valid = searched_table(sweep.problem, rows) if pruned else None
    gone = None if valid is None else pruned_rows(valid, sweep.workload, sweep.cluster, rows)
    if html is not None:
        page = html_page(rows, sweep.name, summary(rows, sweep.name, "", {}))
        try:
            write_text(html, page)
        except OSError as error:
            raise InputError(f"{html}: cannot be written: {error.strerror or error}") from None
        stderr.print(f"wrote {html}", markup=False)
    if json:
        found = answer(rows)
        print_json(
            {
                "sweep": sweep.name,
                "best": None if found is None else found.best.trial.number,
                "tied_with_best": [] if found is None else [standing.trial.number for standing in found.tied],
                "finals": _finals_data(found) if found and found.is_final else [],
                "verdict": verdict(rows),
                "is_running": holder is not None,
                "status": None if status is None else to_data(status),
                "trials": [
                    {
                        "number": row.number,
                        "source": row.source,
                        "note": row.note,
                        "around": list(row.around),
                        "layout": to_data(row.layout),
                        "result": to_data(row.result),
                    }
                    for row in rows
                ],
                **({} if gone is None else {"pruned": pruned_data(gone)}),
            }
        )
        return
    for line in status_lines(status, holder) if status is not None else []:
        stdout.print(line, markup=False, soft_wrap=True)
    stdout.print(terminal_table(rows, sweep.name))
    for sentence in verdict(rows):
        stdout.print(sentence, markup=False, soft_wrap=True)
    if gone is not None and valid is not None:
        print_pruned(gone, len(valid))


def _finals_data(found: Answer) -> list[dict[str, Any]]:
    return [
        {
            "layout": to_data(standing.layout),
            "trials": [row.number for row in standing.runs],
            "step_time_ms": standing.metrics.step_time_ms,
            "step_time_low_ms": standing.metrics.step_time_low_ms,
            "step_time_high_ms": standing.metrics.step_time_high_ms,
            "over_best": to_data(standing.over_best),
        }
        for standing in found.ranking
    ]
