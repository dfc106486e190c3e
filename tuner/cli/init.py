"""megatune init: writes a sweep file with comments to start from, or the sweep file of a recipe."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from search_spaces.loader import load_cluster
from tuner.cli.common import Gpus, OnCluster, RecipeName, stderr
from tuner.core.cluster import with_gpus
from tuner.errors import InputError
from tuner.files import write_text


def init(
    path: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The file to write.")] = Path(
        "sweep.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
    recipe: RecipeName = None,
    gpus: Gpus = None,
    cluster: OnCluster = "detect",
) -> None:
    """Write a sweep file whose comments say what every key means; it runs as it is."""
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; name another file, or write over it with --force")
    if recipe is None:
        text = files("search_spaces").joinpath("sweeps", "template.yaml").read_text(encoding="utf-8")
    else:
        text = recipe_sweep(recipe, gpus, cluster)
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    stderr.print(
        f"wrote {path}. Next: edit it, then `megatune plan {path}`, then `megatune sweep {path}`",
        markup=False,
    )


def recipe_name(recipe: str, gpus: int | None) -> str:
    """Return the name of the sweep of a recipe, which is also the name of its results folder."""
    file, _, function = recipe.partition(":")
    parts = (Path(file).stem, function, f"{gpus}gpu" if gpus else "")
    return "-".join(part for part in parts if part)


def recipe_sweep(recipe: str, gpus: int | None, cluster: str) -> str:
    """Return the text of the sweep file of a recipe.

    Args:
        recipe: the recipe's name, FILE.py, or FILE.py:FUNCTION.
        gpus: how many GPUs to use; None uses all of the cluster.
        cluster: the cluster's name or file; `detect` is this machine.
    """
    name, _, function = recipe.partition(":")
    program = {"recipe": str(Path(name).absolute()) if name.endswith(".py") else name}
    if function:
        program["function"] = function
    choice: dict[str, Any] = {"name": cluster}
    if gpus and cluster == "detect":
        choice["gpus_per_node"] = gpus
    elif gpus:
        whole = with_gpus(load_cluster(cluster), gpus)
        choice |= {"nodes": whole.nodes, "gpus_per_node": whole.gpus_per_node}
    data = {"name": recipe_name(recipe, gpus), "cluster": choice, "program": program}
    return (
        "# The recipe says what is trained, and which layout is to be beaten. `megatune init` without --recipe writes\n"
        "# a file that says what every other key means.\n" + yaml.safe_dump(data, sort_keys=False)
    )
