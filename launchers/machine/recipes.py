"""Reads recipes of Megatron Bridge in a process of its own, and remembers them: importing Bridge takes seconds."""

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

_TIMEOUT_S = 900.0
"""All of Bridge takes under a minute on two cores; a network that does not answer takes longer."""


def read_recipes(request: RecipeRequest) -> tuple[RecipeFacts, ...]:
    """What Bridge says of the recipes of a request; from the user's cache where nothing has changed since.

    What could not be said for what this machine lacks, the network for one, is asked again the next time.

    Raises:
        InputError: if Megatron Bridge is not installed here, or there is no such recipe.
    """
    cached = _cache_file(request)
    if lines := read_json_lines(cached) if cached.is_file() else []:
        return _facts(lines)
    lines = _asked(request)
    found = _facts(lines)
    if not any(map(missing_on_this_machine, found)):
        with suppress(OSError):  # a home that cannot be written costs time, no more
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, "".join(json.dumps(line) + "\n" for line in lines))
    return found


def _facts(lines: Iterable[Any]) -> tuple[RecipeFacts, ...]:
    return tuple(parse(RecipeFacts, line, "a recipe's values") for line in lines)


def read_recipe(program: BridgeRecipe, gpus: int, gpu: str = "h100") -> RecipeFacts:
    """What Bridge says of the recipe that a sweep trains, for a number of GPUs.

    Raises:
        InputError: as `read_recipes`; or if Bridge cannot build the recipe, or refuses it, in its own words.
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
    found = read_recipes(request)
    if len(found) != 1:
        names = ", ".join(facts.name for facts in found) or "none"
        raise InputError(f"{program.recipe}: which of its recipes? function: {names}")
    facts = found[0]
    if facts.error:
        where = f" ({facts.frame})" if facts.frame else ""
        raise InputError(
            f"recipe {facts.name}: Megatron Bridge refuses it on {gpus} GPUs: {facts.error}{where}"
        )
    return facts


def _asked(request: RecipeRequest) -> list[Any]:
    is_installed = find_spec("megatron") is not None and find_spec("megatron.bridge") is not None
    if not is_installed and not any("megatron/bridge" in path for path in request.paths):
        raise InputError(
            "recipes are Megatron Bridge's, which is not installed in this Python: install megatron-bridge beside "
            f"megatune ({sys.executable} -m pip install megatron-bridge), or run megatune in its container"
        )
    with tempfile.TemporaryDirectory(prefix="megatune-recipes-") as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "recipes.jsonl")
        write_text(question, json.dumps(to_data(request)))
        command = [sys.executable, "-m", "launchers.programs.read_recipes", str(question), str(answer)]
        # What is said of a set must not change from run to run.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path()), "PYTHONHASHSEED": "0"}
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"Megatron Bridge did not answer in {_TIMEOUT_S:g} s: does a recipe wait for the network? "
                "HF_HUB_OFFLINE=1 takes Hugging Face's cache alone"
            ) from None
        lines = read_json_lines(answer)
    if lines and "input_error" in lines[-1]:
        raise InputError(str(lines[-1]["input_error"]))
    if ended.returncode or not lines:
        last = "\n  ".join(ended.stderr.strip().splitlines()[-5:]) or "there is no recipe"
        raise InputError(f"Megatron Bridge could not read the recipes:\n  {last}")
    return lines


def _cache_file(request: RecipeRequest) -> Path:
    """By what was asked, the version of Bridge and of the reader, and the state of the files with recipes."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    files = [file for path in request.paths for file in _files(Path(path))]
    package = find_spec("megatron.bridge") if find_spec("megatron") is not None else None
    state = (
        to_data(request),
        [str(Path(path).absolute()) for path in request.paths],
        [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files],
        [_version(name) for name in ("megatron-bridge", "megatron-core", "megatune")],
        package.origin if package is not None else "",
        [(path.stat().st_mtime_ns, path.stat().st_size) for path in _readers()],
    )
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]
    return Path(home) / "megatune" / "recipes" / f"{key}.jsonl"


def _files(path: Path) -> Iterable[Path]:
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _readers() -> Iterable[Path]:
    """The files that decide what is read of a recipe."""
    from tuner.frameworks import megatron_bridge

    return (
        Path(__file__).parents[1] / "programs" / "read_recipes.py",
        *sorted(Path(megatron_bridge.__file__).parent.glob("*.py")),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
