"""The request to read recipes of Megatron Bridge, and the facts about each recipe as plain data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from pydantic import ConfigDict

from tuner.files import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """The values of a recipe's config, or the reason why there are none."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    file: str = ""
    """The Python file that holds the recipe's function."""
    gpus: int = 0
    """Number of GPUs that Bridge resolved the recipe for; 0 if it could not even be built."""
    gpu: str = ""
    """Kind of GPU that Bridge resolved the recipe for, such as h100."""
    megatron_core: str = ""
    """Release of the Megatron-Core that resolved the recipe, such as 0.19.2; empty if it is not known."""
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values of the resolved config, by path (`model.num_layers`). If Bridge refuses to resolve the config, they
    are the values of the config as built; if it cannot be built, there are none."""
    kinds: tuple[str, ...] = ()
    """The class of the model's config, and the classes that it derives from."""
    error: str = ""
    """Bridge's own words if it cannot build the recipe or refuses it: `AssertionError: ...`."""
    frame: str = ""
    """The file and line of Bridge or Megatron that raised `error`."""

    @property
    def built(self) -> bool:
        """Whether there are values to judge."""
        return bool(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeRequest:
    """A request to read recipes, and to resolve them for a number of GPUs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    names: tuple[str, ...] = ()
    """Names of recipes of the installed Bridge."""
    paths: tuple[str, ...] = ()
    """Python files with recipes, or folders of the installed Bridge."""
    everything: bool = False
    """Whether to read all recipes of the installed Bridge."""
    function: str | None = None
    """The only function of a file to read; None reads all functions."""
    arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the recipe's function."""
    gpus: int | None = None
    """Number of GPUs to resolve the recipes for; None takes the number in the name, else the fewest that the recipe's
    own grids need."""
    gpu: str = "h100"
    """Kind of GPU to resolve a recipe for if its name states none."""
    hf_configs: str | None = None
    """A folder of Hugging Face config.json files, which are read instead of files from the network."""


_WORLD_IN_NAME: Final = re.compile(r"_(?P<gpus>\d+)gpu_(?P<gpu>[a-z]+\d+)(?=_|$)")


def named_world(name: str) -> tuple[int, str] | None:
    """Return the number and the kind of GPUs that a name states, such as (64, "b200"); None if it states none."""
    match = _WORLD_IN_NAME.search(name)
    return (int(match["gpus"]), match["gpu"]) if match else None


def missing_on_this_machine(facts: RecipeFacts) -> str:
    """Return what this machine lacks to build a recipe, as Bridge's error tells; empty if it lacks nothing."""
    return next((reason for words, reason in _MACHINE_ERRORS.items() if words in facts.error), "")


_MACHINE_ERRORS: Final[Mapping[str, str]] = {
    "no config.json of": "its Hugging Face config.json is not here",
    "couldn't connect to": "its Hugging Face config.json is neither in the cache nor to be had",
    "offline mode": "its Hugging Face config.json is not in the cache",
    "LocalEntryNotFound": "its Hugging Face config.json is not in the cache",
    "Unrecognized model identifier": "the transformers installed here does not know its model",
    "requires a CUDA device": "Bridge asks the GPU itself",
    "not compiled with CUDA": "Bridge asks the GPU itself",
    "ModuleNotFoundError": "a package that it needs is not installed",
}
"""What the machine lacks, by words in the errors of Bridge, transformers and Python."""
