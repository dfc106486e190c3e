"""megatune pause: have a running sweep start no further trial."""

from tuner.cli.asking import ask_tuner
from tuner.cli.common import ResultsFolder, results_folder


def pause(results: ResultsFolder) -> None:
    """Have a running sweep start no further trial until `megatune resume`; trials that run now come to their end."""
    ask_tuner(results_folder(results), "pause")
