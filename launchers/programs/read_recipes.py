"""Read recipes of Megatron Bridge where it is installed: `python -m launchers.programs.read_recipes REQUEST OUT`.

REQUEST is a JSON file of a `RecipeRequest`; OUT gets one JSON line of `RecipeFacts` per recipe. Each recipe is built by
its own function and resolved as `pretrain` would, for its number of GPUs; no GPU is needed here.
"""

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from launchers.programs.megatron_bridge.load import module_names, named, own_functions
from tuner.errors import InputError
from tuner.files import append_json_line, read_json
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, RecipeRequest, named_world
from tuner.frameworks.megatron_bridge.limits import unstated_architecture
from tuner.frameworks.megatron_bridge.recipe_layout import smallest_world
from tuner.frameworks.megatron_bridge.values import values_of

_KNOWN_TYPES = {"kimi_k2": "deepseek_v3"}
"""Types whose class comes as code from the network, and that of the same shape which transformers has."""


def main(arguments: list[str]) -> int:
    """Read what a request asks for; returns the exit code."""
    request, out = read_json(RecipeRequest, Path(arguments[0])), Path(arguments[1])
    for path in map(Path, request.paths):
        if (root := _root_of_bridge(path)) is not None:
            sys.path.insert(0, str(root))  # a checkout is judged by its own code
    if request.hf_configs:
        os.environ["HF_HUB_OFFLINE"] = "1"
        _read_configs_of(Path(request.hf_configs))
    for name, function in _functions(request):
        append_json_line(out, read(name, function, request))
    return 0


def read(name: str, function: Callable[[], Any], request: RecipeRequest) -> RecipeFacts:
    """Build and resolve one recipe."""
    world = named_world(name)
    gpus, gpu = request.gpus or (world[0] if world else 0), world[1] if world else request.gpu
    facts: dict[str, Any] = {
        "name": name,
        "file": _file_of(function),
        "gpu": gpu,
        "megatron_core": _release(),
    }
    with _job(gpus, gpu):
        config: Any = None
        try:
            with redirect_stdout(sys.stderr):
                config = function()
                facts |= {"values": _values(config), "kinds": _kinds(config)}
                gpus = gpus or smallest_world(facts["values"])
                os.environ["WORLD_SIZE"] = str(gpus)
                facts["values"] = _values(_resolved(config))
                if unstated_architecture(RecipeFacts(**facts)) is None:
                    _split_layers(config)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | MemoryError):
                raise
            facts |= {"error": f"{type(error).__name__}: {error}", "frame": _frame(error)}
    return RecipeFacts(**facts, gpus=gpus)


def _release() -> str:
    import megatron.core

    return str(megatron.core.__version__)


def _resolved(config: Any) -> Any:
    """The config as Bridge's run_recipe.py and `pretrain` leave it before anything is built."""
    from megatron.bridge.training.config import runtime_config_update

    if not hasattr(config, "train") or not hasattr(config, "model"):
        raise TypeError(f"the function returns {type(config).__name__}, no ConfigContainer")
    dataset = getattr(config, "dataset", None)
    if (length := getattr(dataset, "seq_length", None)) is not None and hasattr(config.model, "seq_length"):
        config.model.seq_length = length
    for path in ("path_to_cache", "path"):  # which recipes leave to the user
        if hasattr(dataset, path) and not getattr(dataset, path):
            setattr(dataset, path, os.sep)
    if getattr(config, "peft", None) is not None:
        # A path that is the user's too, and must be there.
        config.checkpoint.pretrained_checkpoint = os.sep
    runtime_config_update(config)
    return config


def _split_layers(config: Any) -> None:
    """Let Megatron split the layers over all stages, as it does first when each rank builds its own."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    model = config.model
    if model.pipeline_model_parallel_layout is None:
        for rank, stage in itertools.product(
            range(model.pipeline_model_parallel_size), range(model.virtual_pipeline_model_parallel_size or 1)
        ):
            get_num_layers_to_build(model, vp_stage=stage, pp_rank=rank)


def _values(config: Any) -> dict[str, Any]:
    values = values_of(config)
    if (peft := getattr(config, "peft", None)) is not None:
        values["peft"] = type(peft).__name__
    return values


def _kinds(config: Any) -> tuple[str, ...]:
    return tuple(kind.__name__ for kind in type(config.model).__mro__ if kind is not object)


def _functions(request: RecipeRequest) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The recipes that are asked for: by name, those of a file or a folder, or all of Bridge."""
    if request.everything:
        yield from _all_of(map(importlib.import_module, module_names()))
    for path in map(Path, request.paths):
        modules = list(_modules_at(path))
        found = [item for module in modules for item in _own(module)]
        if request.function is not None:
            found = [
                (request.function, _chosen(modules, request.function, path, [name for name, _ in found]))
            ]
        elif not found and len(modules) == 1:
            found = [_only_one(modules[0], path)]
        for name, function in found:
            yield name, partial(function, **request.arguments)
    for name in request.names:
        function = named(name)
        yield name, partial(function, **request.arguments)


def _chosen(modules: list[ModuleType], name: str, path: Path, recipes: list[str]) -> Any:
    for module in modules:
        if inspect.isfunction(function := vars(module).get(name)):
            return function
    raise InputError(f"{path}: no function '{name}'; its recipes are {', '.join(recipes) or 'none'}")


def _only_one(module: ModuleType, path: Path) -> tuple[str, Any]:
    """The function of a file that has only one, whatever it says of what it returns."""
    own = own_functions(module)
    if len(own) != 1:
        raise InputError(
            f"{path}: no function there says that it returns a ConfigContainer; it has {', '.join(own) or 'none'}"
        )
    return next(iter(own.items()))


def _all_of(modules: Iterable[ModuleType]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The recipes that modules define, each name once: a few are both library and perf recipes."""
    seen = set()
    for module in modules:
        for name, function in _own(module):
            if name not in seen:
                seen.add(name)
                yield name, function


def _own(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The recipes that a module itself defines: functions that say so, and can be called without arguments."""
    for name, function in own_functions(module).items():
        if _is_recipe(name, function):
            yield name, function


def _is_recipe(name: str, function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    told = signature.return_annotation
    returns_one = "ConfigContainer" in str(told) or (told is signature.empty and name.endswith("_config"))
    variadic = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    needs_none = all(p.default is not p.empty or p.kind in variadic for p in signature.parameters.values())
    return returns_one and needs_none


def _modules_at(path: Path) -> Iterator[ModuleType]:
    """A Python file as a module, or each of a folder: of a checkout of Bridge under the names it has there."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for file in files:
        if (root := _root_of_bridge(file)) is not None:
            name = ".".join(file.resolve().relative_to(root).with_suffix("").parts)
            yield importlib.import_module(name.removesuffix(".__init__"))
            continue
        spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}_{abs(hash(file))}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def _root_of_bridge(path: Path) -> Path | None:
    """The folder that holds the package megatron.bridge, where a path lies in one."""
    folders = (path.resolve(), *path.resolve().parents)
    return next(
        (f.parent.parent for f in folders if f.name == "bridge" and f.parent.name == "megatron"), None
    )


@contextmanager
def _job(gpus: int, gpu: str) -> Iterator[None]:
    """Put this process into a job of so many GPUs of a kind; what Bridge adds to its environment goes again."""
    import torch

    cuda: Any = torch.cuda
    before, asked = dict(os.environ), cuda.get_device_properties
    os.environ.update(RANK="0", WORLD_SIZE=str(gpus or 1))
    if gpu:
        # All that is asked of the device is its generation and its name.
        device = SimpleNamespace(major=_generation(gpu), minor=0, name=f"NVIDIA {gpu.upper()}")
        cuda.get_device_properties = lambda *_: device
    try:
        yield
    finally:
        cuda.get_device_properties = asked
        os.environ.clear()
        os.environ.update(before)


def _generation(gpu: str) -> int:
    """The major compute capability: Ampere 8, Hopper 9, and 10 for what came later."""
    return 8 if gpu.startswith("a") else 9 if gpu.startswith("h") else 10


def _read_configs_of(folder: Path) -> None:
    """Let Bridge read `MODEL--ID_config.json` or `MODEL/ID/config.json` of a folder instead of asking the network."""
    from megatron.bridge import AutoBridge

    def from_hf_pretrained(model: str, **_: Any) -> Any:
        name = str(model)
        candidates = (folder / name / "config.json", folder / f"{name.replace('/', '--')}_config.json")
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no config.json of {name} in {folder}")
        return AutoBridge.from_hf_config(_hugging_face_config(json.loads(path.read_text("utf-8")), name))

    AutoBridge.from_hf_pretrained = staticmethod(from_hf_pretrained)


def _hugging_face_config(data: dict[str, Any], name: str) -> Any:
    kind = data.pop("model_type")
    data.pop("auto_map", None)
    config = importlib.import_module("transformers").AutoConfig.for_model(
        _KNOWN_TYPES.get(kind, kind), **data
    )
    config.name_or_path = name
    return config


def _file_of(function: Any) -> str:
    return inspect.getsourcefile(getattr(function, "func", function)) or ""


def _frame(error: BaseException) -> str:
    """The innermost line of Megatron's own code that an error passed: `megatron/bridge/training/config.py:1101`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/megatron/" in frame.filename:
            return f"megatron/{frame.filename.rpartition('/megatron/')[2]}:{frame.lineno}"
    return ""


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except InputError as mistake:
        Path(sys.argv[2]).write_text(json.dumps({"input_error": str(mistake)}) + "\n", encoding="utf-8")
        code = 2
    sys.exit(code)
