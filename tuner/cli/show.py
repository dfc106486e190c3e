"""megatune show: what a sweep has measured so far."""

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.common import AsJson, ResultsFolder, print_json, results_folder, stderr, stdout
from tuner.errors import InputError
from tuner.files import to_data, write_text
from tuner.report import best, html_page, read_trials, summary, terminal_table, tie


def show(
    results: ResultsFolder,
    json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write one self-contained HTML page.")
    ] = None,
) -> None:
    """Print the trials of a sweep, running or finished: fastest first, then the failed ones."""
    folder = results_folder(results)
    sweep, rows = folder.sweep(), read_trials(folder.path)
    if html is not None:
        page = html_page(rows, sweep.name, summary(rows, sweep.name, "", {}))
        try:
            write_text(html, page)
        except OSError as error:
            raise InputError(f"{html}: cannot be written: {error.strerror or error}") from None
        stderr.print(f"wrote {html}", markup=False)
    if json:
        fastest = best(rows)
        print_json(
            {
                "sweep": sweep.name,
                "best": None if fastest is None else fastest.number,
                "tied_with_best": [row.number for row in tie(rows)],
                "trials": [
                    {
                        "number": row.number,
                        "source": row.source,
                        "note": row.note,
                        "layout": to_data(row.layout),
                        "result": to_data(row.result),
                    }
                    for row in rows
                ],
            }
        )
        return
    stdout.print(terminal_table(rows, sweep.name))
