"""A Megatron Bridge ConfigContainer in our nouns, and as flat values."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, Layout
from tuner.core.workload import Workload
from tuner.frameworks.megatron_bridge import recipe_layout, recipe_workload
from tuner.frameworks.megatron_bridge.values import values_of


def workload_of(config: Any, name: str) -> Workload:
    """What a resolved config trains, which no override may change."""
    return recipe_workload.workload_of(values_of(config), name)


def layout_of(config: Any) -> Layout:
    """The layout that a resolved config selects, but for the variables of its environment."""
    unset = {knob: DEFAULTS[knob] for knob in ENVIRONMENT_KNOBS}
    return replace(recipe_layout.layout_of(values_of(config)), **unset)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of a config by its path. Functions are named, since each build makes its own."""
    return dict(_leaves(value, path))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        inner = {name: getattr(value, name, None) for name in names}
    elif isinstance(value, dict):
        inner = value
    else:
        yield path, _comparable(value)
        return
    for name, part in inner.items():
        yield from _leaves(part, f"{path}.{name}" if path else str(name))


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_comparable(part) for part in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    return getattr(value, "__qualname__", None) or type(value).__qualname__ + repr(
        getattr(value, "value", "")
    )
