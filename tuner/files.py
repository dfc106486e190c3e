"""Dataclasses in YAML and JSON files: reading is strict and bounded, and writing is atomic.

Every file that somebody else may have written is opened here: only regular files are read, and none without a bound.
"""

import errno
import json
import os
import stat
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import yaml
from pydantic import ConfigDict, ValidationError

from tuner.errors import InputError
from tuner.validation import adapter, explain

T = TypeVar("T")
"""A dataclass that is read from a file."""

STRICT: ConfigDict = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""The pydantic configuration of every dataclass that is read from a file (its `__pydantic_config__`)."""

MOST_BYTES: Final = 32 << 20
"""The bytes of the largest file that is read whole. Assumed: the result of a job whose 4,096 ranks all failed, with
their tracebacks, takes 20 MB."""
MOST_TEXT_BYTES: Final = 1 << 20
"""The bytes of the largest text that a person writes: a YAML file, a script, a recipe. Assumed: a `run_config.yaml`
that lists 5,000 data files takes half of it."""

_MOST_VALUES: Final = 100_000
"""The most values of one YAML file with its anchors written out. Assumed: no file of ours comes near, and ten lines of
anchors can stand for more values than any memory holds."""
_LONG_VALUE: Final = 100
"""Characters of a text in YAML that count as one value, since an anchor repeats long texts too."""
_DEEPEST: Final = 100
"""How deep a YAML file may be nested. Assumed: libyaml's loader has no bound, and a deep file ends the process."""

_LOADER: Final[type[Any]] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""The safe loader of YAML: libyaml's where PyYAML was built with it, which is five times as fast."""


def regular(path: str, flags: int) -> int:
    """Open a file for `open(path, opener=regular)`, unless it is a pipe, a device or a folder.

    Opening a pipe would wait for its writer for ever.

    Raises:
        OSError: if there is no such file, or it is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    reason = (
        os.strerror(code) if stat.S_ISDIR(mode) else "is a pipe, a socket or a device, and no regular file"
    )
    raise OSError(code, reason, path)


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: if the file cannot be read, is no regular file, or is larger than `most_bytes`.
    """
    with open(path, "rb", opener=regular) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        size = f"{most_bytes >> 20} MiB" if most_bytes >> 20 else f"{most_bytes >> 10} KiB"
        raise OSError(errno.EFBIG, f"is larger than {size}", str(path))
    return content


def read_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        InputError: if the file cannot be read, is no regular file, is larger than `most_bytes`, or is no such text.
    """
    try:
        return read_bytes(path, most_bytes).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file in UTF-8") from None


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
    except RecursionError:
        raise InputError(f"{source}: is nested too deeply") from None


def read_yaml_data(path: Path) -> object:
    """Return the plain data of a YAML file; no tag of YAML can build an object.

    Raises:
        InputError: if the file is missing, unreadable, too large or not YAML.
    """
    text = read_text(path)
    try:
        _check_events(text)
        loader = _LOADER(text)
        try:
            node = loader.get_single_node()
            _check_node(node, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply, or contains itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"{path}: is not YAML{where}: {getattr(error, 'problem', error)}") from None
    except ValueError as error:  # a number with too many digits, or a date that no calendar has
        raise InputError(f"{path}: holds a value that cannot be read: {error}") from None


def _check_events(text: str) -> None:
    """Refuse a YAML text that is nested too deeply, or has too many values, before a loader reads it.

    Raises:
        RecursionError: if it is nested more than `_DEEPEST` deep.
        yaml.MarkedYAMLError: if it has more than `_MOST_VALUES` values.
    """
    depth = values = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if depth > _DEEPEST:
            raise RecursionError
        if values > _MOST_VALUES:
            raise _too_many_values(event.start_mark)


def _check_node(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Return the number of values of a node with its anchors written out; `counted` holds nodes that are done.

    YAML forbids a key that stands twice in one mapping, but PyYAML keeps the last one and says nothing.

    Raises:
        yaml.MarkedYAMLError: if there are too many values, or a key is there twice or is no plain word.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1 if node is None else 1 + len(node.value) // _LONG_VALUE
    if id(node) not in counted:
        items = node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            items = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_check_node(item, counted) for item in items)
        if counted[id(node)] > _MOST_VALUES:
            raise _too_many_values(node.start_mark)
    return counted[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    keys = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is no plain word", problem_mark=key.start_mark)
        if key.value in keys:
            raise yaml.MarkedYAMLError(
                problem=f"key '{key.value}' is there twice", problem_mark=key.start_mark
            )
        keys.add(key.value)


def _too_many_values(mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"stands for more than {_MOST_VALUES:,} values", problem_mark=mark)


def read_yaml(cls: type[T], path: Path) -> T:
    """Return the `cls` that a YAML file holds.

    Raises:
        InputError: if the file is missing or not YAML, or its data does not fit.
    """
    return parse(cls, read_yaml_data(path), str(path))


def read_json(cls: type[T], path: Path) -> T:
    """Return the `cls` that a JSON file holds.

    Raises:
        InputError: if the file is missing, torn or too large, or its data does not fit.
    """
    text = _json_text(path)
    try:
        value: T = adapter(cls).validate_json(text)
        return value
    except ValidationError:
        return parse(cls, _json_data(text, path), str(path))  # its error is written for people


def read_json_data(path: Path) -> Any:
    """Return the data of a JSON file.

    Raises:
        InputError: if the file is missing, torn or too large.
    """
    return _json_data(_json_text(path), path)


def _json_text(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json_data(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None


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


def refuse_unsafe_entries(root: Path) -> None:
    """Refuse a folder with a link that leads out of it, or with a pipe, a socket or a device, at any depth.

    All that is read or written below the folder must lie in it, and opening a pipe may wait for ever.

    Raises:
        InputError: if there is such an entry. The error names it.
    """
    inside, folders = root.resolve(), [str(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink():
                    _refuse_link_out(Path(entry.path), inside)
                elif not entry.is_file(follow_symlinks=False):
                    raise InputError(
                        f"{entry.path}: is a pipe, a socket or a device, which no sweep makes; remove it"
                    )


def _refuse_link_out(path: Path, inside: Path) -> None:
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        target = path
    if not target.is_relative_to(inside):
        raise InputError(
            f"{path}: is a link that leads out of the results, to {target}; remove it, or put what it leads to in its "
            "place"
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
    with open(path, "ab+", opener=regular) as file:
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
        lines = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    values = []
    for line in lines[:-1]:
        with suppress(ValueError, RecursionError):
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
