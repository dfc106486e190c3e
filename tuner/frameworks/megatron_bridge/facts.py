"""The request to read recipes of Megatron Bridge, and the answer: the facts about each recipe, as plain data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from pydantic import ConfigDict

from tuner.files import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """What Megatron Bridge says of one recipe: the values of its config, or the error that Bridge raised."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    file: str = ""
    """The Python file that defines the recipe's function."""
    gpus: int = 0
    """The number of GPUs for which Bridge resolved the recipe; 0 if Bridge could not build it."""
    gpu: str = ""
    """The kind of GPU for which Bridge resolved the recipe, such as h100."""
    megatron_core: str = ""
    """The release of Megatron-Core with which Bridge resolved the recipe, such as 0.19.2; empty if it is not known."""
    values: dict[str, Any] = field(default_factory=dict)
    """The plain values of the resolved config, by path (`model.num_layers`). If Bridge refuses to resolve the config,
    these are the values of the config as built; if Bridge cannot build it, this is empty."""
    kinds: tuple[str, ...] = ()
    """The names of the class of the model's config and of its base classes."""
    error: str = ""
    """Bridge's error message if it cannot build or resolve the recipe, such as `AssertionError: ...`; else empty."""
    frame: str = ""
    """The file and line in Bridge or Megatron at which `error` was raised."""

    @property
    def built(self) -> bool:
        """Whether Bridge could build the recipe, so that there are values."""
        return bool(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeRequest:
    """A request to read recipes, and to have Bridge resolve them for a number of GPUs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    names: tuple[str, ...] = ()
    """Names of recipes of the installed Bridge."""
    paths: tuple[str, ...] = ()
    """Python files with recipes, or folders of the installed Bridge."""
    everything: bool = False
    """Whether to read all recipes of the installed Bridge."""
    function: str | None = None
    """The only function to read from a Python file; None reads all functions."""
    arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments with which the recipe's function is called."""
    gpus: int | None = None
    """The number of GPUs for which recipes are resolved. None takes the number in the recipe's name, and without one
    the fewest GPUs that the recipe's own layout needs."""
    gpu: str = "h100"
    """The kind of GPU for which a recipe is resolved if its name states none."""
    hf_configs: str | None = None
    """A folder of Hugging Face config.json files that are read instead of files from the network; None uses none."""


_WORLD_IN_NAME: Final = re.compile(r"_(?P<gpus>\d+)gpu_(?P<gpu>[a-z]+\d+)(?=_|$)")


def named_world(name: str) -> tuple[int, str] | None:
    """Return the number and kind of GPUs that a recipe's name states, such as (64, "b200"); None if it states none."""
    match = _WORLD_IN_NAME.search(name)
    return (int(match["gpus"]), match["gpu"]) if match else None


def missing_on_this_machine(facts: RecipeFacts) -> str:
    """Return what this machine lacks to build a recipe, as derived from Bridge's error; empty if it lacks nothing."""
    return next((reason for words, reason in _MACHINE_ERRORS.items() if words in facts.error), "")


_MACHINE_ERRORS: Final[Mapping[str, str]] = {
    "no config.json of": "its Hugging Face config.json is not here",
    "couldn't connect to": "its Hugging Face config.json is neither in the cache nor to be had",
    "offline mode": "its Hugging Face config.json is not in the cache",
    "LocalEntryNotFound": "its Hugging Face config.json is not in the cache",
    "Unrecognized model identifier": "the transformers installed here does not know its model",
    "requires a CUDA device": "Bridge needs a GPU to build it",
    "not compiled with CUDA": "Bridge needs a GPU to build it",
    "ModuleNotFoundError": "a package that it needs is not installed",
}
"""What the machine lacks, by a text in the error of Bridge, transformers or Python."""
