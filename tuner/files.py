"""Reading and writing of our dataclasses as YAML and JSON: strict, unknown keys refused, writes atomic."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

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
        # A date that YAML reads out of a plain word is the word again.
        text = json.dumps(data, allow_nan=False, default=str)
        value: T = _adapter(cls).validate_json(text)
        return value
    except ValidationError as error:
        problems = _nearest_branches(error.errors(include_url=False), json.loads(text))
        lines = [_explain(cls, key, items) for key, items in problems.items()]
        raise InputError(f"{source}: " + "\n  ".join(dict.fromkeys(lines))) from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: cannot be read as JSON data: {error}") from None


def read_yaml_data(path: Path) -> object:
    """Read a YAML file safely.

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


_MOST_VALUES = 1_000_000
"""In one YAML file, anchors written out: ten lines of them can stand for more than any memory holds."""


def _check_node(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Count the values of a node, anchors written out; refuse too many of them, and a key that is there twice.

    YAML forbids a key to stand twice in one mapping; PyYAML keeps the last and says nothing.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        items = node.value
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key '{key.value}' is there twice", problem_mark=key.start_mark
                    )
                seen.add(str(key.value))
            items = [value for _, value in node.value]
        counted[id(node)] = 1 + sum(_check_node(item, counted) for item in items)
        if counted[id(node)] > _MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"stands for more than {_MOST_VALUES:,} values", problem_mark=node.start_mark
            )
    return counted[id(node)]


def read_yaml(cls: type[T], path: Path) -> T:
    """Read `cls` from a YAML file; raises InputError as `parse` and `read_yaml_data` do."""
    return parse(cls, read_yaml_data(path), str(path))


def read_json(cls: type[T], path: Path) -> T:
    """Read `cls` from a JSON file, its texts fit to be shown.

    Raises:
        InputError: where the file is missing, torn or of another shape.
    """
    return parse(cls, printable(read_json_data(path)), str(path))


def read_json_data(path: Path) -> Any:
    """Read a JSON file; raises InputError where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None


_UNPRINTABLE = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del _UNPRINTABLE[ord("\n")], _UNPRINTABLE[ord("\t")]


def printable(data: Any) -> Any:
    """JSON data without control characters in its texts: a file from someone else must not steer the terminal."""
    if isinstance(data, str):
        return data.translate(_UNPRINTABLE)
    if isinstance(data, list):
        return [printable(item) for item in data]
    if isinstance(data, dict):
        return {printable(key): printable(value) for key, value in data.items()}
    return data


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
    _sync_folder(path.parent)


def refuse_links_out(root: Path) -> None:
    """Refuse a folder that holds a link which leads out of it: what is read or written below it must lie there.

    Raises:
        InputError: naming the link, and where it leads.
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
    """Make a folder, and those above it, so that its name survives a power loss."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent)


def append_json_line(path: Path, value: object) -> None:
    """Append a dataclass (or plain data) as one line of JSON, synced; for one writer at a time.

    What an earlier writer left of a torn line is cut off first. Raises OSError where the line cannot be written whole;
    what was written of it is then no line to `read_json_lines`.
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
    """The data of each line of a file that `append_json_line` wrote; empty where there is no such file.

    A last line without its end is left out: its writer was killed, or lost its power. So is any other line that is no
    JSON: after a power loss a file system may give zeros back.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    whole = []
    for line in lines[:-1]:
        with suppress(ValueError):
            whole.append(json.loads(line))
    return whole


def _cut_torn_line(file: BinaryIO) -> None:
    if not file.tell():
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _sync_folder(folder: Path) -> None:
    """A name in a folder survives a power loss once the folder itself is synced."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


Problem = Mapping[str, Any]
"""One of pydantic's errors: its `loc`, `type`, `msg` and `input`."""

_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
_MISSING = frozenset({"missing", "missing_argument"})


def _nearest_branches(problems: Sequence[Problem], data: object) -> dict[tuple[str, ...], list[Problem]]:
    """The problems by the key that the user sees; of a union's branches those of the one that fits best.

    Pydantic tells what is wrong with every branch, and puts the branch's name among the keys of `loc`.
    """
    by_key: dict[tuple[str, ...], dict[str, list[Problem]]] = {}
    plain: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        place = _branch_place(problem, data)
        location = tuple(map(str, problem["loc"]))
        if place is None:
            plain.setdefault(location, []).append(problem)
        else:
            by_key.setdefault(location[:place], {}).setdefault(location[place], []).append(problem)
    for key, branches in by_key.items():
        entered = [
            [{**p, "loc": (*p["loc"][: len(key)], *p["loc"][len(key) + 1 :])} for p in branch]
            for branch in branches.values()
        ]
        # A branch whose own type is another is no near miss, unless none is one.
        near = [
            branch
            for branch in entered
            if all(len(p["loc"]) > len(key) or p["type"] == "value_error" for p in branch)
        ]
        best = min(near, key=_misfit) if near else [problem for branch in entered for problem in branch]
        for inner, found in _nearest_branches(best, data).items():
            plain.setdefault(inner, []).extend(found)
    return plain


def _misfit(branch: Sequence[Problem]) -> tuple[int, int]:
    """How badly a union's branch fits: what is there and wrong tells more than what is missing."""
    return sum(problem["type"] not in _MISSING for problem in branch), len(branch)


def _branch_place(problem: Problem, data: object) -> int | None:
    """Where in a problem's location the name of a union's branch stands: it is no key of the data."""
    location = problem["loc"]
    for place, part in enumerate(location):
        is_index = isinstance(data, list) and isinstance(part, int)
        if is_index or (isinstance(data, dict) and part in data):
            data = data[part]  # type: ignore[index]  # a list or a dict, by the line above
        elif problem["type"] in _MISSING and place == len(location) - 1:
            return None
        else:
            return place
    return None


def _explain(cls: type[Any], location: tuple[str, ...], problems: Sequence[Problem]) -> str:
    """One line about a key; several problems of one key are the branches of a union, none of which fits."""
    key, error = ".".join(location), problems[0]
    if error["type"] in _UNKNOWN:
        return f"unknown key '{key}'{did_you_mean(location[-1], _known_keys(cls, list(location[:-1])))}"
    if error["type"] in _MISSING:
        return f"missing key '{key}'"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
    else:
        words = (_WORDS.get(p["type"], p["msg"].removeprefix("Input should be ")) for p in problems)
        message = f"should be {' or '.join(dict.fromkeys(words))}, not {_shown(error['input'])}"
    return f"key '{key}': {message}" if key else message


_WORDS: Mapping[str, str] = {
    "dataclass_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
}
"""Where pydantic's own words are JSON's, not those of a YAML file."""


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
