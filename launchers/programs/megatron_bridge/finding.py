"""Finds the recipes that a request asks for: Bridge's own, or those in a Python file that it names."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from launchers.programs.megatron_bridge.load import module_names, named, own_functions
from tuner.errors import InputError
from tuner.frameworks.megatron_bridge.facts import RecipeRequest


def recipes_of(request: RecipeRequest) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and the function of each recipe asked for: by name, in a file or a folder, or all of Bridge's.

    Raises:
        InputError: if there is no such recipe.
    """
    if request.everything:
        yield from _all_of(map(importlib.import_module, module_names()))
    for path in map(Path, request.paths):
        for name, function in _recipes_at(path, request.function):
            yield name, partial(function, **request.arguments)
    for name in request.names:
        function = named(name)
        yield name, partial(function, **request.arguments)


def _recipes_at(path: Path, function_name: str | None) -> list[tuple[str, Callable[..., Any]]]:
    """Return the names and functions of the recipes in a file or a folder; if a function is named, only this one."""
    modules = list(_modules_at(path))
    recipes = [recipe for module in modules for recipe in _own_recipes(module)]
    if function_name is not None:
        names = ", ".join(name for name, _ in recipes) or "none"
        for module in modules:
            if inspect.isfunction(function := vars(module).get(function_name)):
                return [(function_name, function)]
        raise InputError(f"{path}: no function '{function_name}'; its recipes are {names}")
    if not recipes and len(modules) == 1:
        return [_only_function(modules[0], path)]
    return recipes


def _only_function(module: ModuleType, path: Path) -> tuple[str, Any]:
    """Return the name and the function of a file that has only one, whatever return type it is annotated with."""
    functions = own_functions(module)
    if len(functions) != 1:
        raise InputError(
            f"{path}: no function there says that it returns a ConfigContainer; "
            f"it has {', '.join(functions) or 'none'}"
        )
    return next(iter(functions.items()))


def _all_of(modules: Iterable[ModuleType]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and the function of each recipe that `modules` define, each name once.

    A few names are defined twice, as a library recipe and as a perf recipe.
    """
    seen_names = set()
    for module in modules:
        for name, function in _own_recipes(module):
            if name not in seen_names:
                seen_names.add(name)
                yield name, function


def _own_recipes(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name and the function of each recipe that a module itself defines.

    A recipe is a function that needs no arguments and returns a config.
    """
    for name, function in own_functions(module).items():
        if _is_recipe(name, function):
            yield name, function


def _is_recipe(name: str, function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    returned = signature.return_annotation
    is_unannotated = returned is signature.empty and name.endswith("_config")
    returns_config = "ConfigContainer" in str(returned) or is_unannotated
    variadic = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    needs_none = all(p.default is not p.empty or p.kind in variadic for p in signature.parameters.values())
    return returns_config and needs_none


def _modules_at(path: Path) -> Iterator[ModuleType]:
    """Import the Python file that a path names and yield its module, or yield each module of a folder of Bridge.

    A file of the installed Bridge is imported under its name in the package.

    Raises:
        InputError: if the path is a folder outside the installed Bridge: nobody named the files in it.
    """
    bridge = Path(next(iter(importlib.import_module("megatron.bridge").__path__))).resolve()
    if (inside := path.resolve()).is_relative_to(bridge):
        for file in sorted(inside.rglob("*.py")) if inside.is_dir() else [inside]:
            parts = ("megatron", "bridge", *file.relative_to(bridge).with_suffix("").parts)
            yield importlib.import_module(".".join(parts).removesuffix(".__init__"))
        return
    if path.is_dir():
        raise InputError(f"{path}: is a folder, and a file is only imported if it is named")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
