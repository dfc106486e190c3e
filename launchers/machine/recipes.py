"""Reads recipes of Megatron Bridge in a process of its own, and caches them, since importing Bridge takes seconds."""

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
"""How long the reading may take. Measured: all of Bridge takes under a minute on two cores. Only a network that does
not answer takes longer than this."""


def read_recipes(request: RecipeRequest) -> tuple[RecipeFacts, ...]:
    """Return Bridge's facts of the recipes of a request, from the user's cache where nothing has changed since.

    Facts that are incomplete because this machine lacks something, for instance the network, are not cached.

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
    """Return Bridge's facts of the recipe that a sweep trains, for a number of GPUs.

    Raises:
        InputError: for the reasons of `read_recipes`, or in Bridge's own words if it cannot build the recipe.
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
    """Return the folder of the installed package megatron.bridge, found without importing it; None if there is none."""
    spec = find_spec("megatron.bridge") if find_spec("megatron") is not None else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _read(request: RecipeRequest) -> list[Any]:
    """Run the reader; return its lines, one per recipe."""
    if bridge_folder() is None:
        raise InputError(
            "recipes are Megatron Bridge's, which is not installed in this Python: install megatron-bridge beside "
            f"megatune ({sys.executable} -m pip install megatron-bridge), or run megatune in its container"
        )
    with tempfile.TemporaryDirectory(prefix="megatune-recipes-") as folder:
        request_path, facts_path = Path(folder, "request.json"), Path(folder, "recipes.jsonl")
        write_text(request_path, json.dumps(to_data(request)))
        # -P: a file of the working directory must not pass for a module that the reader imports.
        command = [sys.executable, "-P", "-m", _READER, str(request_path), str(facts_path)]
        # The order of a set in a message must not change from run to run.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path()), "PYTHONHASHSEED": "0"}
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"Megatron Bridge did not answer in {_TIMEOUT_S:g} s: does a recipe wait for the network? "
                "HF_HUB_OFFLINE=1 uses Hugging Face's cache alone"
            ) from None
        lines = read_json_lines(facts_path)
    if lines and "input_error" in lines[-1]:
        raise InputError(str(lines[-1]["input_error"]))
    if ended.returncode or not lines:
        last_lines = "\n  ".join(ended.stderr.strip().splitlines()[-5:]) or "there is no recipe"
        raise InputError(f"Megatron Bridge could not read the recipes:\n  {last_lines}")
    return lines


def _cache_file(request: RecipeRequest) -> Path:
    """Return the cache file of a request.

    Its name depends on the request, on the versions of Bridge and of the reader, and on the files that hold recipes.
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
    """Return the source files of the reader: another reader may read other facts of a recipe."""
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
