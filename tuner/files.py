"""Dataclasses in YAML and JSON files: reading is strict and refuses unknown keys, and writing is atomic."""

import json
import os
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import ConfigDict, ValidationError

from tuner.errors import InputError
from tuner.validation import adapter, explain

T = TypeVar("T")
"""A dataclass that is read from a file."""

STRICT: ConfigDict = {"extra": "forbid", "strict": True}
"""The pydantic configuration of every dataclass that is read from a file (its `__pydantic_config__`)."""

_MOST_VALUES = 1_000_000
"""Most values of one YAML file with its anchors written out. Assumed: no file of ours comes near, and ten lines of
anchors can stand for more values than any memory holds."""

_UNPRINTABLE = {
    code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in {ord("\n"), ord("\t")}
}
"""Control characters, as a table for `str.translate` that removes them."""


def parse(cls: type[T], data: object, source: str) -> T:
    """Return a `cls` with the values of plain data (from YAML or JSON), checked strictly.

    Raises:
        InputError: if the data does not fit. The error names `source`, the key, what is wrong, and for an unknown key
            the nearest known one.
    """
    try:
        # In JSON mode lists become tuples and strings become enums, but "8" does not become an integer.
        # `default=str` turns a date that YAML read from a plain word into that word again.
        text = json.dumps(data, allow_nan=False, default=str)
        value: T = adapter(cls).validate_json(text)
        return value
    except ValidationError as error:
        lines = explain(cls, error.errors(include_url=False), json.loads(text))
        raise InputError(f"{source}: " + "\n  ".join(lines)) from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: cannot be read as JSON data: {error}") from None


def read_yaml_data(path: Path) -> object:
    """Return the plain data of a YAML file; no tag of YAML can build an object.

    Raises:
        InputError: if the file is missing, unreadable or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _check_node(yaml.compose(text, Loader=yaml.SafeLoader), {})
        return yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file in UTF-8") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply, or contains itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"{path}: is not YAML{where}: {getattr(error, 'problem', error)}") from None


def _check_node(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Return the number of values of a node with its anchors written out; `counted` holds nodes that are done.

    YAML forbids a key that stands twice in one mapping, but PyYAML keeps the last one and says nothing.

    Raises:
        yaml.MarkedYAMLError: if there are too many values, or a key is there twice.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        items = node.value
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"key '{key.value}' is there twice", problem_mark=key.start_mark
                    )
                keys.add(str(key.value))
            items = [value for _, value in node.value]
        counted[id(node)] = 1 + sum(_check_node(item, counted) for item in items)
        if counted[id(node)] > _MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"stands for more than {_MOST_VALUES:,} values", problem_mark=node.start_mark
            )
    return counted[id(node)]


def read_yaml(cls: type[T], path: Path) -> T:
    """Return the `cls` that a YAML file holds.

    Raises:
        InputError: if the file is missing or not YAML, or its data does not fit.
    """
    return parse(cls, read_yaml_data(path), str(path))


def read_json(cls: type[T], path: Path) -> T:
    """Return the `cls` that a JSON file holds; control characters are removed from its texts (`printable`).

    Raises:
        InputError: if the file is missing or torn, or its data does not fit.
    """
    return parse(cls, printable(read_json_data(path)), str(path))


def read_json_data(path: Path) -> Any:
    """Return the data of a JSON file.

    Raises:
        InputError: if the file is missing or torn.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None


def printable(data: Any) -> Any:
    """Return JSON data without control characters in its texts, since a foreign file must not steer the terminal."""
    if isinstance(data, str):
        return data.translate(_UNPRINTABLE)
    if isinstance(data, list):
        return [printable(item) for item in data]
    if isinstance(data, dict):
        return {printable(key): printable(value) for key, value in data.items()}
    return data


def to_data(value: object) -> Any:
    """Return a dataclass as plain JSON data."""
    return adapter(type(value)).dump_python(value, mode="json")


def write_json(path: Path, value: object) -> None:
    """Write a dataclass or plain data as JSON, as `write_text` writes."""
    data = to_data(value) if is_dataclass(value) else value
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old or the new content, even after a power loss.

    The text is written to a file beside the target, synced, and renamed over the target.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def write_new_text(path: Path, text: str) -> bool:
    """Write a text file unless there is one; return whether it was written. Of two writers, only one succeeds."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def refuse_links_out(root: Path) -> None:
    """Refuse a folder with a link that leads out of it, since all that is read or written below it must lie in it.

    Raises:
        InputError: if there is such a link. The error names the link and where it leads.
    """
    inside = root.resolve()
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise InputError(
                    f"{path}: is a link that leads out of the results, to {path.resolve()}; remove it, or put what it "
                    "leads to in its place"
                )


def make_folder(path: Path) -> None:
    """Make a folder and the folders above it; its name survives a power loss."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent)


def append_json_line(path: Path, value: object) -> None:
    """Append a dataclass or plain data as one line of JSON, and sync the file. Only one writer may append at a time.

    A torn line that an earlier writer left is cut off first.

    Raises:
        OSError: if the line cannot be written whole. `read_json_lines` ignores the part that was written.
    """
    data = to_data(value) if is_dataclass(value) else value
    line = json.dumps(data, allow_nan=False).encode() + b"\n"
    is_new = not path.exists()
    with path.open("ab+") as file:
        _cut_torn_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync_folder(path.parent)


def read_json_lines(path: Path) -> list[Any]:
    """Return the data of each line of a file that `append_json_line` wrote; an empty list if there is no such file.

    A last line without its end is left out: its writer was killed or lost power. Any other line that is not JSON is
    left out too: after a power loss, a file system may return zeros.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    values = []
    for line in lines[:-1]:
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off a last line that does not end in a line break."""
    if not file.tell():
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, after which the names in it survive a power loss."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def field_names(cls: type[Any]) -> list[str]:
    """Return the field names of a dataclass, in order."""
    return [field.name for field in fields(cls)]
