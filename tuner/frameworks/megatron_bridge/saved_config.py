"""Reads the `run_config.yaml` that Megatron Bridge saves with every checkpoint."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tuner.frameworks.megatron_bridge.facts import RecipeFacts
from tuner.frameworks.megatron_bridge.recipe_layout import smallest_world
from tuner.frameworks.megatron_bridge.values import values_of


def saved_facts(data: object, name: str, gpus: int | None) -> RecipeFacts | None:
    """Return the facts of a recipe, read from its saved config; None if the data is not a saved ConfigContainer.

    Args:
        data: The parsed content of the file. Its key `_target_` names a class, a function or a member of an enum.
        name: The name for the recipe.
        gpus: The number of GPUs of the job, which the file does not state; None takes the fewest that the layout needs.
    """
    if not isinstance(data, Mapping) or not str(data.get("_target_")).endswith(".ConfigContainer"):
        return None
    values = values_of(_object(data))
    model = data.get("model")
    kind = str(model.get("_target_", "")).rpartition(".")[2] if isinstance(model, Mapping) else ""
    return RecipeFacts(name=name, gpus=gpus or smallest_world(values), values=values, kinds=(kind,))


def _object(node: Any) -> Any:
    """Return a node of the file as an object with the saved attributes; a function or an enum's member as its name."""
    if isinstance(node, list):
        return [_object(part) for part in node]
    if not isinstance(node, Mapping) or "_target_" not in node:
        return node
    if "_call_" in node:
        return node.get("_name_") or str(node["_target_"]).rpartition(".")[2]
    return SimpleNamespace(**{str(key): _object(part) for key, part in node.items()})
