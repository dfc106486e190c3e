"""Megatron Bridge's own pre-training recipes, built on a CPU without the network."""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bridge.configs import SAME_SHAPE, SMALL

_DECODERS = "llama|qwen2|qwen25|qwen3|deepseek_v2|deepseek_v3|kimi_k2|moonlight|gpt3|gpt_oss|glm45|gemma3"
_NAME = re.compile(
    rf"({_DECODERS}|llama\d+)_(?!vl_|next_)\w*pretrain_(?P<gpus>\d+)gpu_(?P<gpu>[a-z]+\d+)_\w*config"
)
"""Matches the names of recipes whose models `Model` can state: text alone, with attention and MLP in every layer."""

REFUSED_BY_BRIDGE = {
    "deepseek_v3_pretrain_256gpu_gb200_fp8mx_partial_cg_dev_config": "conflicts with pipeline_model_parallel_layout",
    "deepseek_v3_pretrain_256gpu_gb300_fp8mx_partial_cg_dev_config": "conflicts with pipeline_model_parallel_layout",
    "qwen3_235b_a22b_pretrain_128gpu_b200_fp8mx_deepep_dev_config": "Conflicting deprecated SM-count knobs",
}
"""Recipes that Bridge 0.6.2 itself refuses to run unchanged, each with its words."""


class NoConfigError(Exception):
    """The model of a recipe has no config.json here."""


def recipes() -> dict[str, Callable[[], Any]]:
    """Return the functions of the pre-training recipes whose names state a number of GPUs, by name."""
    functions = {}
    for package in ("megatron.bridge.recipes", "megatron.bridge.perf_recipes"):
        for module in _modules(package):
            for name, function in vars(module).items():
                # A module also holds the functions that it imports.
                is_own = inspect.isfunction(function) and function.__module__ == module.__name__
                if is_own and _NAME.fullmatch(name):
                    functions[name] = function
    return dict(sorted(functions.items()))


def gpus(name: str) -> tuple[int, str]:
    """Return the number and the kind of GPUs that a recipe is for, such as (64, "b200")."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match["gpus"]), match["gpu"]


def read_configs_locally() -> None:
    """Replace `AutoBridge.from_hf_pretrained`, which asks the network, by a function that reads the files here."""
    from megatron.bridge import AutoBridge

    def from_hf_pretrained(path: str, **kwargs: Any) -> Any:
        return AutoBridge.from_hf_config(_hugging_face_config(str(path)))

    AutoBridge.from_hf_pretrained = staticmethod(from_hf_pretrained)


def _modules(package: str) -> Iterator[Any]:
    for entry in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        yield importlib.import_module(entry.name)


@cache
def _hugging_face_config(name: str) -> Any:
    data = dict(_config_json(name))
    # Kimi's class is DeepSeek-V3's under another name; its code would come from the network.
    kind = "deepseek_v3" if data["model_type"] == "kimi_k2" else data.pop("model_type")
    data.pop("auto_map", None)
    data.pop("model_type", None)
    config = importlib.import_module("transformers").AutoConfig.for_model(kind, **data)
    config.name_or_path = name
    return config


def _config_json(name: str) -> Mapping[str, Any]:
    name = SAME_SHAPE.get(name, name)
    if name in SMALL:
        return SMALL[name]
    package = find_spec("aiconfigurator_core")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "model_configs" / f"{name.replace('/', '--')}_config.json"
    if not path.exists():
        raise NoConfigError(f"no config.json of {name} here")
    data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
