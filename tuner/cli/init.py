"""megatune init: a commented sweep file to start from."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.common import stderr
from tuner.errors import InputError
from tuner.files import write_text


def init(
    path: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The file to write.")] = Path(
        "sweep.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Write a sweep file that says in its comments what every key means; it runs as it is."""
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; name another file, or write over it with --force")
    try:
        write_text(
            path, files("search_spaces").joinpath("sweeps", "template.yaml").read_text(encoding="utf-8")
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    stderr.print(
        f"wrote {path}. Next: edit it, then `megatune plan {path}`, then `megatune sweep {path}`",
        markup=False,
    )
