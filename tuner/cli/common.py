"""Arguments, consoles and readers of folders and layouts that several commands share."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tuner.cli.terminal import Terminal
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import parse, refuse_unsafe_entries
from tuner.sweep.folder import SweepFolder

SweepPath = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file; `init` writes one.")]
ResultsRoot = Annotated[Path, typer.Option("--results", help="Folder that holds one folder per sweep.")]
ResultsFolder = Annotated[
    Path,
    typer.Argument(metavar="RESULTS", help="A sweep's results folder, results/<sweep>, or just <sweep>."),
]
Knobs = Annotated[
    list[str], typer.Argument(metavar="KNOB=VALUE...", help="The layout: tp=2 pp=4 sp=true ...")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Tune a recipe of Megatron Bridge: its name, a Python file, or FILE.py:FUNCTION. No sweep file is needed.",
    ),
]
Gpus = Annotated[int | None, typer.Option("--gpus", help="How many GPUs; default: all of them.")]
OnCluster = Annotated[
    str,
    typer.Option("--cluster", help="For --recipe: a built-in cluster or its YAML; `detect` is this machine."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--uri",
        help="The MLflow tracking URI, without a password; by default MLFLOW_TRACKING_URI, or SQLite in the folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]

# A table that is piped has no terminal's width to fit into. Python has no stdout if the shell closed it.
stdout = Terminal(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 120)
stderr = Terminal(stderr=True, soft_wrap=True, highlight=False)


def results_folder(folder: Path) -> SweepFolder:
    """Return the results folder that a user names by its path or by the sweep's name.

    Raises:
        InputError: if there is no such folder, or a link in it leads out of it.
    """
    candidate = folder if folder.exists() else Path("results") / folder
    if not candidate.is_dir():
        raise InputError(f"{folder}: there is no such results folder (nor {candidate})")
    refuse_unsafe_entries(candidate)
    return SweepFolder(candidate)


def parse_layout(pairs: list[str]) -> Layout:
    """Return the layout that words `KNOB=VALUE` describe.

    Raises:
        InputError: naming the word that cannot be read, or the knob that is unknown.
    """
    data: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise InputError(f"'{pair}': write a knob as NAME=VALUE, as in tp=2")
        try:
            if name in data:
                raise InputError(f"'{pair}': {name} is given twice")
            data[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"'{pair}': the value cannot be read") from None
    return parse(Layout, data, "layout")


def print_json(data: Any) -> None:
    """Print data for a script: plain JSON, never wrapped or coloured."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
