"""Reads recipes of Megatron Bridge: `python -m launchers.programs.megatron_bridge.read_recipes REQUEST OUT`.

REQUEST is a JSON file of a `RecipeRequest`; to the file OUT, one JSON line of `RecipeFacts` per recipe is appended.
Each recipe is built by its own function, for its number of GPUs, and then resolved as `pretrain` would do it, which
sets the values that a recipe leaves open. No GPU is needed here.
"""

import inspect
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from launchers.programs.megatron_bridge.finding import recipes_of
from launchers.programs.megatron_bridge.stand_ins import in_job, read_configs_of
from tuner.errors import InputError
from tuner.files import append_json_line, read_json
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, RecipeRequest, named_world
from tuner.frameworks.megatron_bridge.limits import unstated_architecture
from tuner.frameworks.megatron_bridge.recipe_layout import smallest_world
from tuner.frameworks.megatron_bridge.values import values_of


def main(arguments: list[str]) -> int:
    """Read the recipes that a request asks for, and write their facts; return the exit code.

    `arguments` are the paths REQUEST and OUT.
    """
    request, out = read_json(RecipeRequest, Path(arguments[0])), Path(arguments[1])
    if request.hf_configs:
        os.environ["HF_HUB_OFFLINE"] = "1"
        read_configs_of(Path(request.hf_configs))
    for name, function in recipes_of(request):
        append_json_line(out, read(name, function, request))
    return 0


def read(name: str, function: Callable[[], Any], request: RecipeRequest) -> RecipeFacts:
    """Build and resolve one recipe; return its facts, including the error if Bridge raised one."""
    world = named_world(name)
    gpus, gpu = request.gpus or (world[0] if world else 0), world[1] if world else request.gpu
    facts: dict[str, Any] = {
        "name": name,
        "file": _file_of(function),
        "gpu": gpu,
        "megatron_core": _megatron_core_version(),
    }
    with in_job(gpus, gpu):
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


def _megatron_core_version() -> str:
    import megatron.core

    return str(megatron.core.__version__)


def _resolved(config: Any) -> Any:
    """Return the config after Bridge's run_recipe.py and `pretrain` would have changed it, before anything is built."""
    from megatron.bridge.training.config import runtime_config_update

    if not hasattr(config, "train") or not hasattr(config, "model"):
        raise TypeError(f"the function returns {type(config).__name__}, which is not a ConfigContainer")
    dataset = getattr(config, "dataset", None)
    if (length := getattr(dataset, "seq_length", None)) is not None and hasattr(config.model, "seq_length"):
        config.model.seq_length = length
    for path in ("path_to_cache", "path"):  # recipes leave them to the user
        if hasattr(dataset, path) and not getattr(dataset, path):
            setattr(dataset, path, os.sep)
    if getattr(config, "peft", None) is not None:
        # Recipes leave this path to the user as well, and Bridge refuses a path that does not exist.
        config.checkpoint.pretrained_checkpoint = os.sep
    runtime_config_update(config)
    return config


def _split_layers(config: Any) -> None:
    """Let Megatron compute the layers of all stages, so that it raises its error if it refuses the layers.

    In a job, each rank does this for its own stage when it begins to build the model.
    """
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
    """Return the names of the classes that the model's config derives from, the most derived first."""
    return tuple(kind.__name__ for kind in type(config.model).__mro__ if kind is not object)


def _file_of(function: Any) -> str:
    return inspect.getsourcefile(getattr(function, "func", function)) or ""


def _frame(error: BaseException) -> str:
    """Return the innermost line of Megatron's code in a traceback, like `megatron/bridge/training/config.py:1101`."""
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
