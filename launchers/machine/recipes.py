"""Reads recipes of Megatron Bridge in a separate process, and caches them, since importing Bridge takes seconds."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launchers.processes import python_path
from tuner.errors import InputError
from tuner.files import parse, read_json_lines, to_data, write_text
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, RecipeRequest, missing_on_this_machine
from tuner.trial.program import BridgeRecipe

_READER = "launchers.programs.megatron_bridge.read_recipes"

_TIMEOUT_S = 900.0
"""The time limit for reading recipes, in seconds. Assumed: reading all recipes of Bridge was measured to take less than
a minute on two cores, so only a network that does not answer takes longer."""


def read_recipes(request: RecipeRequest) -> tuple[RecipeFacts, ...]:
    """Return what Megatron Bridge says of each recipe in a request.

    The facts come from the user's cache unless Bridge, megatune or a requested file has changed since they were read.
    Facts that are incomplete because this machine lacks something, such as a network, are not cached.

    Raises:
        InputError: if Megatron Bridge is not installed here, or there is no such recipe.
    """
    cached = _cache_file(request)
    if lines := read_json_lines(cached) if cached.is_file() else []:
        return _facts(lines)
    lines = _read(request)
    facts = _facts(lines)
    if not any(map(missing_on_this_machine, facts)):
        with suppress(OSError):  # a home that cannot be written only costs time
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, "".join(json.dumps(line) + "\n" for line in lines))
    return facts


def _facts(lines: Iterable[Any]) -> tuple[RecipeFacts, ...]:
    return tuple(parse(RecipeFacts, line, "a recipe's values") for line in lines)


def read_recipe(program: BridgeRecipe, gpus: int, gpu: str = "h100") -> RecipeFacts:
    """Return what Megatron Bridge says of the one recipe that a sweep tunes.

    Args:
        program: The recipe's name or file, its function and arguments.
        gpus: The number of GPUs for which Bridge builds the recipe.
        gpu: The kind of GPU for which Bridge builds the recipe, such as h100, if the recipe's name states none.

    Raises:
        InputError: if there is not exactly one such recipe; with Bridge's error message if Bridge cannot build the
            recipe; also for the reasons of `read_recipes`.
    """
    is_file = program.recipe.endswith(".py")
    request = RecipeRequest(
        names=() if is_file else (program.recipe,),
        paths=(program.recipe,) if is_file else (),
        function=program.function,
        arguments=program.arguments,
        gpus=gpus,
        gpu=gpu,
    )
    recipes = read_recipes(request)
    if len(recipes) != 1:
        names = ", ".join(facts.name for facts in recipes) or "none"
        raise InputError(f"{program.recipe}: which of its recipes? function: {names}")
    facts = recipes[0]
    if facts.error:
        where = f" ({facts.frame})" if facts.frame else ""
        raise InputError(
            f"recipe {facts.name}: Megatron Bridge refuses it on {gpus} GPUs: {facts.error}{where}"
        )
    return facts


def bridge_folder() -> Path | None:
    """Return the folder of the package megatron.bridge, without importing it; None if it is not installed."""
    spec = find_spec("megatron.bridge") if find_spec("megatron") is not None else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _read(request: RecipeRequest) -> list[Any]:
    """Read the recipes of a request in a separate process; return its output, one JSON object per recipe."""
    if bridge_folder() is None:
        raise InputError(
            "recipes are Megatron Bridge's, which is not installed in this Python: install megatron-bridge beside "
            f"megatune ({sys.executable} -m pip install megatron-bridge), or run megatune in its container"
        )
    with tempfile.TemporaryDirectory(prefix="megatune-recipes-") as folder:
        request_path, facts_path = Path(folder, "request.json"), Path(folder, "recipes.jsonl")
        write_text(request_path, json.dumps(to_data(request)))
        # -P: the reader must not import files of the working directory in place of modules with the same name.
        command = [sys.executable, "-P", "-m", _READER, str(request_path), str(facts_path)]
        # A fixed hash seed: Bridge's messages may print a set, whose order would change from run to run.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path()), "PYTHONHASHSEED": "0"}
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"Megatron Bridge did not answer in {_TIMEOUT_S:g} s: does a recipe wait for the network? "
                "HF_HUB_OFFLINE=1 uses only Hugging Face's cache"
            ) from None
        lines = read_json_lines(facts_path)
    if lines and "input_error" in lines[-1]:
        raise InputError(str(lines[-1]["input_error"]))
    if ended.returncode or not lines:
        last_lines = "\n  ".join(ended.stderr.strip().splitlines()[-5:]) or "there is no recipe"
        raise InputError(f"Megatron Bridge could not read the recipes:\n  {last_lines}")
    return lines


def _cache_file(request: RecipeRequest) -> Path:
    """Return the path of the cache file for a request.

    The file's name is a hash of the request, of the versions of Bridge, Megatron-Core and megatune, and of the paths,
    sizes and modification times of the requested files and of the reader's source files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    files = [file for path in request.paths for file in _files(Path(path))]
    state = (
        to_data(request),
        [str(Path(path).absolute()) for path in request.paths],
        [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files],
        [_version(name) for name in ("megatron-bridge", "megatron-core", "megatune")],
        str(bridge_folder()),
        [(path.stat().st_mtime_ns, path.stat().st_size) for path in _readers()],
    )
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]
    return Path(home) / "megatune" / "recipes" / f"{key}.jsonl"


def _files(path: Path) -> Iterable[Path]:
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _readers() -> Iterable[Path]:
    """Return the source files of the code that reads recipes; when they change, cached facts are outdated."""
    from tuner.frameworks import megatron_bridge

    return (
        *sorted((Path(__file__).parents[1] / "programs" / "megatron_bridge").glob("*.py")),
        *sorted(Path(megatron_bridge.__file__).parent.glob("*.py")),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
