"""Messages about data that does not fit a dataclass, in one line per key, for the person who wrote the data."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from tuner.errors import did_you_mean

adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""Return pydantic's adapter of a type; each adapter is built once."""

Problem = Mapping[str, Any]
"""One of pydantic's errors: its `loc`, `type`, `msg` and `input`."""

_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
"""Types of pydantic's errors about an unknown key."""
_MISSING = frozenset({"missing", "missing_argument"})
"""Types of pydantic's errors about a missing key."""
_WORDS: Mapping[str, str] = {
    "dataclass_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
}
"""What a value should be, in words of YAML, for types of errors that pydantic describes in words of JSON."""


def explain(cls: type[Any], problems: Sequence[Problem], data: object) -> list[str]:
    """Return one line per key that says what is wrong with it.

    Args:
        cls: The dataclass that the data does not fit.
        problems: The errors that pydantic reports.
        data: The data.
    """
    by_key = _nearest_branches(problems, data)
    return list(dict.fromkeys(_line(cls, key, of_key) for key, of_key in by_key.items()))


def _nearest_branches(problems: Sequence[Problem], data: object) -> dict[tuple[str, ...], list[Problem]]:
    """Return the problems by the key that the user sees; for a union, only the problems of the branch that fits best.

    Pydantic reports what is wrong with every branch of a union, and puts the name of the branch among the keys of
    `loc`.
    """
    by_union: dict[tuple[str, ...], dict[str, list[Problem]]] = {}
    by_key: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        place = _branch_place(problem, data)
        location = tuple(map(str, problem["loc"]))
        if place is None:
            by_key.setdefault(location, []).append(problem)
        else:
            by_union.setdefault(location[:place], {}).setdefault(location[place], []).append(problem)
    for key, branches in by_union.items():
        without_names = [
            [{**p, "loc": (*p["loc"][: len(key)], *p["loc"][len(key) + 1 :])} for p in branch]
            for branch in branches.values()
        ]
        for inner_key, of_key in _nearest_branches(_best_branch(key, without_names), data).items():
            by_key.setdefault(inner_key, []).extend(of_key)
    return by_key


def _best_branch(key: tuple[str, ...], branches: Sequence[Sequence[Problem]]) -> Sequence[Problem]:
    """Return the problems of the branch of a union at `key` that fits best, or of all branches if none is near.

    A branch of another type than the data is not near.
    """
    near = [
        branch
        for branch in branches
        if all(len(p["loc"]) > len(key) or p["type"] == "value_error" for p in branch)
    ]
    return min(near, key=_misfit) if near else [problem for branch in branches for problem in branch]


def _misfit(branch: Sequence[Problem]) -> tuple[int, int]:
    """Return how badly a branch of a union fits; wrong keys count for more than missing ones."""
    return sum(problem["type"] not in _MISSING for problem in branch), len(branch)


def _branch_place(problem: Problem, data: object) -> int | None:
    """Return the index in a problem's location of the name of a union's branch, which is not a key of the data."""
    location = problem["loc"]
    for place, part in enumerate(location):
        is_index = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if is_index or (isinstance(data, dict) and part in data):
            data = data[part]  # type: ignore[index]  # a list or a dict, by the line above
        elif problem["type"] in _MISSING and place == len(location) - 1:
            return None
        else:
            return place
    return None


def _line(cls: type[Any], location: tuple[str, ...], problems: Sequence[Problem]) -> str:
    """Return one line about a key; several problems of one key belong to the branches of a union that does not fit."""
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


def _shown(value: object) -> str:
    """Return a value in at most 60 characters, without what follows `://` in it: a URI may hold a password."""
    if value is None:
        return "empty"
    text = re.sub(r'://[^\s"]+', "://...", json.dumps(value, default=str))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(cls: type[Any], location: list[str]) -> list[str]:
    """Return the keys of the dataclass at `location`; the JSON schema, which resolves all nesting, knows them."""
    schema = adapter(cls).json_schema()
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
        # The location also names branches of unions. Such a name is not a key, so `nodes` stay as they are.
        nodes = [node for node in inner if isinstance(node, dict)] or resolved
    return []
