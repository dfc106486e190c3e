"""A ConfigContainer of Megatron Bridge as a workload, as a layout, and as flat values."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, Layout
from tuner.core.workload import Workload
from tuner.frameworks.megatron_bridge import recipe_layout, recipe_workload
from tuner.frameworks.megatron_bridge.values import values_of


def workload_of(config: Any, name: str) -> Workload:
    """Return the workload of a resolved config, which no override may change."""
    return recipe_workload.workload_of(values_of(config), name)


def layout_of(config: Any) -> Layout:
    """Return the layout of a resolved config; the knobs of the environment have their defaults."""
    unset = {knob: DEFAULTS[knob] for knob in ENVIRONMENT_KNOBS}
    return replace(recipe_layout.layout_of(values_of(config)), **unset)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return every value of a config by its path; a function as its name, since each build makes new functions."""
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
