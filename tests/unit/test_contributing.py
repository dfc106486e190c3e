"""CONTRIBUTING.md is the plan of the house: its tables name every room, and its glossary names code that exists."""

import re
import tomllib
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _cells(heading: str) -> list[list[str]]:
    """The rows of the table whose heading line begins with this text, as cells."""
    lines = TEXT.split(f"\n| {heading} |", 1)[1].splitlines()[2:]
    rows = takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _rooms(package: str) -> set[str]:
    """The rooms of a package that the import contracts name."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == [package])
    return {room.strip() for layer in layers for room in layer.split("|")} - {"__main__"}


@pytest.mark.parametrize("package", ["tuner", "launchers"])
def test_the_plan_names_exactly_the_rooms_of_the_contracts(package: str) -> None:
    named = [name for cells in _cells(f"room of `{package}/`") for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted(_rooms(package))


GLOSSARY = {cells[0]: re.findall(r"`([a-z_]+(?:\.\w+)+)`", cells[2]) for cells in _cells("word")}


@pytest.mark.parametrize("word", GLOSSARY)
def test_every_word_of_the_glossary_names_code_that_exists(word: str) -> None:
    assert GLOSSARY[word]
    for name in GLOSSARY[word]:
        module, _, last = name.rpartition(".")
        if last[0].isupper():
            assert hasattr(import_module(module), last)
        else:
            import_module(name)


def test_no_word_of_the_glossary_has_two_meanings() -> None:
    words = [word for cells in _cells("word") for word in cells[0].split(", ")]
    assert len(words) == len(set(words))
