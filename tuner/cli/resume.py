"""megatune resume: have a paused sweep go on."""

from tuner.cli.asking import ask_tuner
from tuner.cli.common import ResultsFolder, results_folder


def resume(results: ResultsFolder) -> None:
    """Have a paused sweep go on. A sweep that has ended goes on by `megatune sweep` instead."""
    ask_tuner(results_folder(results), "resume")
