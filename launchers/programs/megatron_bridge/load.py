"""Finds a recipe and builds its config: one of Bridge's own by its name, or a function of a Python file."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from tuner.errors import InputError, did_you_mean
from tuner.frameworks.megatron_bridge.recipe_file import with_file_text
from tuner.trial.program import BridgeRecipe

PACKAGES: Final = ("megatron.bridge.recipes", "megatron.bridge.perf_recipes")
"""The packages that hold the library recipes and the perf recipes of Bridge."""


def load_config(program: BridgeRecipe) -> Any:
    """Return the ConfigContainer that a recipe's function builds, unchanged.

    Raises:
        InputError: if there is no such recipe, or what its function returns is no config.
    """
    function = _of_file(program) if program.recipe.endswith(".py") else named(program.recipe)
    try:
        inspect.signature(function).bind(**program.arguments)
    except TypeError as error:
        raise InputError(f"key 'program.arguments': {program.recipe}: {error}") from None
    config = function(**program.arguments)
    if not hasattr(config, "model") or not hasattr(config, "train"):
        raise InputError(
            f"key 'program.recipe': {program.recipe}: {function.__name__} returns {type(config).__name__}, "
            "which is not a ConfigContainer"
        )
    return config


def named(name: str) -> Callable[..., Any]:
    """Return a recipe function of Bridge by its name or an alias.

    Only modules whose text contains the name are imported.

    Raises:
        InputError: if there is none.
    """
    for module in module_names(containing=name):
        function = vars(importlib.import_module(module)).get(name)
        if inspect.isfunction(function):
            return function
    names = [
        function_name
        for module in map(importlib.import_module, module_names())
        for function_name, value in vars(module).items()
        if inspect.isfunction(value)
    ]
    raise InputError(
        f"key 'program.recipe': Megatron Bridge has no recipe '{name}'{did_you_mean(name, names)}; a file's name must "
        "end in .py"
    )


def module_names(containing: str = "") -> Iterator[str]:
    """Yield the names of Bridge's modules that may define recipes and whose text contains `containing`."""
    for package in PACKAGES:
        for entry in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            origin = spec.origin if (spec := importlib.util.find_spec(entry.name)) else None
            if not containing or (origin is not None and containing in Path(origin).read_text("utf-8")):
                yield entry.name


def own_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the public functions that a module itself defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


class _Recorded(InspectLoader):
    """Loads a recipe's file from the text that the file had when the trial was launched."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text


def _of_file(program: BridgeRecipe) -> Callable[..., Any]:
    """Return the function that the program names in its Python file; if it names none, the file's only recipe."""
    path = Path(program.recipe)
    spec = importlib.util.spec_from_loader(
        f"recipe_{path.stem}", _Recorded(with_file_text(program).text), origin=str(path)
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    functions = own_functions(module)
    recipes = {name: value for name, value in functions.items() if _says_config(value)} or functions
    if program.function is None and len(recipes) == 1:
        return next(iter(recipes.values()))
    if program.function not in functions:
        asked = (
            f"no function '{program.function}'"
            if program.function
            else f"{len(recipes)} functions, state one"
        )
        raise InputError(f"key 'program.function': {path} has {asked}; it has {', '.join(recipes) or 'none'}")
    return functions[program.function]


def _says_config(function: Callable[..., Any]) -> bool:
    return "ConfigContainer" in str(inspect.signature(function).return_annotation)
