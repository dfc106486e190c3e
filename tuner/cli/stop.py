"""megatune stop: end a running sweep."""

from typing import Annotated

import typer

from tuner.cli.asking import ask_tuner
from tuner.cli.common import ResultsFolder, results_folder


def stop(
    results: ResultsFolder,
    after_this_trial: Annotated[
        bool,
        typer.Option("--after-this-trial", help="Let the trials that run now come to their end first."),
    ] = False,
) -> None:
    """End a running sweep, and wait until it has ended. Everything measured is kept."""
    ask_tuner(results_folder(results), "stop_after_this_trial" if after_this_trial else "stop")
