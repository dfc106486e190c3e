"""Reading and writing of our dataclasses as YAML and JSON: strict, unknown keys refused, writes atomic."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tuner.errors import InputError, did_you_mean

T = TypeVar("T")

STRICT: ConfigDict = {"extra": "forbid", "strict": True}
"""The pydantic configuration of every dataclass that is read from a file (its `__pydantic_config__`)."""


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def parse(cls: type[T], data: object, source: str) -> T:
    """Build `cls` from plain data (of YAML or JSON), strictly.

    Raises:
        InputError: naming `source`, the key, what is wrong, and the nearest known key for an unknown one.
    """
    try:
        # JSON mode: lists become tuples and strings become enums, yet "8" is still no integer.
        value: T = _adapter(cls).validate_json(json.dumps(data))
        return value
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors(include_url=False)]
        raise InputError(f"{source}: " + "\n  ".join(dict.fromkeys(lines))) from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: cannot be read as JSON data: {error}") from None


def read_yaml_data(path: Path) -> object:
    """Read a YAML file safely.

    Raises:
        InputError: if the file is missing, unreadable or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"{path}: is not YAML{where}: {getattr(error, 'problem', error)}") from None


def read_yaml(cls: type[T], path: Path) -> T:
    """Read `cls` from a YAML file; raises InputError as `parse` and `read_yaml_data` do."""
    return parse(cls, read_yaml_data(path), str(path))


def read_json(cls: type[T], path: Path) -> T:
    """Read `cls` from a JSON file; raises InputError where the file is missing, torn or of another shape."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    return parse(cls, data, str(path))


def to_data(value: object) -> Any:
    """Return a dataclass as plain JSON data."""
    return _adapter(type(value)).dump_python(value, mode="json")


def write_json(path: Path, value: object) -> None:
    """Write a dataclass (or plain data) as JSON: beside the target, synced, then renamed over it."""
    data = to_data(value) if is_dataclass(value) else value
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content whole, also after a power loss."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _explain(cls: type[Any], error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        return f"unknown key '{key}'{did_you_mean(location[-1], _known_keys(cls, location[:-1]))}"
    if error["type"] in {"missing", "missing_argument"}:
        return f"missing key '{key}'"
    message = error["msg"].removeprefix("Value error, ")
    return f"key '{key}': {message}" if key else message


def _known_keys(cls: type[Any], location: list[str]) -> list[str]:
    """The keys of the dataclass at `location`, found through the JSON schema, which resolves every nesting."""
    schema = _adapter(cls).json_schema()
    definitions = schema.get("$defs", {})
    nodes = [schema]
    for part in [*location, None]:
        resolved = []
        while nodes:
            node = nodes.pop()
            if "$ref" in node:
                nodes.append(definitions[node["$ref"].rsplit("/", 1)[-1]])
            elif "anyOf" in node:
                nodes.extend(node["anyOf"])
            else:
                resolved.append(node)
        if part is None:
            return sorted({key for node in resolved for key in node.get("properties", {})})
        inner = [node.get("properties", {}).get(part) or node.get("items") for node in resolved]
        # A union's branch shows in the location by its own name, which is no key: stay where we are.
        nodes = [node for node in inner if isinstance(node, dict)] or resolved
    return []


def field_names(cls: type[Any]) -> list[str]:
    """The field names of a dataclass, in order."""
    return [field.name for field in fields(cls)]
