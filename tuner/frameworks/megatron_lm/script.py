"""Finds the training command in the text of a shell script: its words, and the variables that are set when it starts.

Lint, the configuration of a sweep and the trial all use this module, so they find the same command.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final

from tuner.errors import InputError
from tuner.frameworks.megatron_lm.expansion import Expander
from tuner.frameworks.megatron_lm.shell import ArrayAssignment, Assignment, Piece, Statement, Word, statements

_LEADING_WORDS: Final = frozenset({"if", "then", "elif", "else", "while", "until", "do", "{", "!", "time"})
"""Reserved words of the shell that may stand before a command."""
_DECLARING_WORDS: Final = frozenset({"export", "readonly", "declare", "typeset", "local"})
"""Commands of the shell whose arguments are assignments."""
_VARIABLE: Final = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_MODEL_FLAG: Final = "--num-layers"
"""The flag by which a training command is recognised."""
_UNTOLD: Final = ("$", "`", "<(", ">(")
"""Marks of an expansion that is left in a word because only a running shell knows its value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptCommand:
    """A command of a script, after its variables and arrays were expanded."""

    words: tuple[str, ...]
    """All words of the command except redirections. Those before the Python script are torchrun and its arguments."""
    variables: dict[str, str] = field(default_factory=dict)
    """The values that variables of the script have when the command starts, with those that the command itself sets."""

    @property
    def program(self) -> tuple[str, ...]:
        """The words from the Python script on; empty if no word ends with `.py`."""
        first = next(
            (place for place, word in enumerate(self.words) if word.endswith(".py")), len(self.words)
        )
        return self.words[first:]


def training_command(text: str, source: str) -> ScriptCommand:
    """Return the training command in a text.

    It is the last command that runs a Python script with the flag --num-layers. If there is none, it is the last
    command with --num-layers, after each line that begins with a flag was joined to the line before it. If there is
    none either, the elements of all arrays in the text are taken as the arguments.

    Args:
        text: A shell script, a command, or only the arguments of a command.
        source: The name of the text in error messages.

    Raises:
        InputError: if a quotation or an array is not closed, or the text expands too far.
    """
    commands, arrays = _read(text, source)
    return (
        next((command for command in reversed(commands) if _trains(command.program)), None)
        or next((command for command in reversed(_continued(commands)) if _trains(command.words)), None)
        or arrays
    )


def script_words(text: str, source: str) -> tuple[str, ...]:
    """Return the words of the training command in a shell script, from the Python script on.

    `source` is the name of the shell script in error messages.

    Raises:
        InputError: if there is no such command, or one of its words has a value that only a running shell knows.
    """
    commands, _ = _read(text, source)
    program = next((command.program for command in reversed(commands) if _trains(command.program)), None)
    if program is None:
        raise InputError(
            f"{source}: no command of a Python script with {_MODEL_FLAG}: is it a Megatron-LM script?"
        )
    if untold := next((word for word in program if any(mark in word for mark in _UNTOLD)), None):
        raise InputError(
            f"{source}: '{untold}': only a running shell knows it; write the value into the script"
        )
    return program


def _trains(words: tuple[str, ...]) -> bool:
    return any(word.partition("=")[0] == _MODEL_FLAG for word in words)


def _read(text: str, source: str) -> tuple[list[ScriptCommand], ScriptCommand]:
    """Return the commands of a text in their order, and one more command made of the elements of all its arrays."""
    expander = Expander()
    try:
        commands = [command for statement in statements(text) if (command := _command(statement, expander))]
        variables = expander.texts()
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    arrays = (value for value in expander.values.values() if isinstance(value, tuple))
    return commands, ScriptCommand(words=tuple(chain.from_iterable(arrays)), variables=variables)


def _command(statement: Statement, expander: Expander) -> ScriptCommand | None:
    """Return the command of a statement. If the statement only assigns, update `expander.values` and return None."""
    items = list(statement)
    while items and _reserved_word(items[0]) in _LEADING_WORDS:
        del items[0]
    first = next((place for place, item in enumerate(items) if isinstance(item, tuple)), len(items))
    if first == len(items) or _reserved_word(items[0]) in _DECLARING_WORDS:
        for item in items:
            if not isinstance(item, tuple):
                expander.values[item.name] = expander.assigned(item)
        return None
    own_values = {item.name: expander.assigned(item) for item in items[:first] if not isinstance(item, tuple)}
    own_texts = {name: value for name, value in own_values.items() if isinstance(value, str)}
    words = tuple(part for item in items[first:] for part in expander.expanded(_word(item)))
    command = ScriptCommand(words=words)
    launcher = words[: len(words) - len(command.program)]
    stated = {match[1]: match[2] for word in launcher if (match := _VARIABLE.fullmatch(word))}
    return replace(command, variables=expander.texts() | own_texts | stated)


def _reserved_word(item: Word | Assignment | ArrayAssignment) -> str:
    """Return the text of an item that is a word without quotations; empty for any other item."""
    is_plain = isinstance(item, tuple) and len(item) == 1 and not item[0].quote
    return item[0].text if isinstance(item, tuple) and is_plain else ""


def _word(item: Word | Assignment | ArrayAssignment) -> Word:
    """Return an item among a command's arguments as a word: `NAME=value` assigns nothing at this place."""
    if isinstance(item, Assignment):
        return (Piece(f"{item.name}{'+' if item.appends else ''}=", ""), *item.value)
    return item if isinstance(item, tuple) else ()


def _continued(commands: list[ScriptCommand]) -> list[ScriptCommand]:
    """Join each command whose first word is a flag to the command before it, and return the resulting commands."""
    groups: list[list[ScriptCommand]] = []
    for command in commands:
        if groups and command.words[:1] and command.words[0].startswith("--"):
            groups[-1].append(command)
        else:
            groups.append([command])
    return [
        ScriptCommand(
            words=tuple(chain.from_iterable(command.words for command in group)),
            variables=group[-1].variables,
        )
        for group in groups
    ]
