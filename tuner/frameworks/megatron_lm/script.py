"""The one training command in the text of a shell script: its words, and the variables that are set when it starts.

Every reader of a script takes the command from here: lint, the configuration of a sweep, and the trial.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final

from tuner.errors import InputError
from tuner.frameworks.megatron_lm.expansion import Expander
from tuner.frameworks.megatron_lm.shell import ArrayAssignment, Assignment, Piece, Statement, Word, statements

_LEADING_WORDS: Final = frozenset({"if", "then", "elif", "else", "while", "until", "do", "{", "!", "time"})
"""Reserved words of the shell that stand before a command."""
_DECLARING_WORDS: Final = frozenset({"export", "readonly", "declare", "typeset", "local"})
"""Commands of the shell whose arguments are assignments."""
_VARIABLE: Final = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_MODEL_FLAG: Final = "--num-layers"
"""The argument by which a training command is told from other commands."""
_UNTOLD: Final = ("$", "`", "<(", ">(")
"""Texts of which a word holds one if only a shell could tell its value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptCommand:
    """A command of a script, with its variables and arrays filled in."""

    words: tuple[str, ...]
    """All words of the command without its redirections; they begin with the launcher (torchrun and its arguments)."""
    variables: dict[str, str] = field(default_factory=dict)
    """Values, when the command starts, of the variables that the script or the command itself assigns."""

    @property
    def program(self) -> tuple[str, ...]:
        """The words from the Python script on; empty if no word names one."""
        first = next(
            (place for place, word in enumerate(self.words) if word.endswith(".py")), len(self.words)
        )
        return self.words[first:]


def training_command(text: str, source: str) -> ScriptCommand:
    """Return the command that trains, from a shell script or from a text of arguments alone.

    It is the last command of a Python script with --num-layers. Without one, it is the last command with
    --num-layers, where a line that begins with an argument continues the line before. Without that, the arrays
    of the text are taken as the arguments.

    Args:
        text: A script, a command or arguments.
        source: The name of the text in errors.

    Raises:
        InputError: if a quotation or an array is not closed.
    """
    commands, arrays = _read(text, source)
    return (
        next((command for command in reversed(commands) if _trains(command.program)), None)
        or next((command for command in reversed(_continued(commands)) if _trains(command.words)), None)
        or arrays
    )


def script_words(text: str, source: str) -> tuple[str, ...]:
    """Return the words of the training command in a shell script, from the Python script on.

    Raises:
        InputError: if there is no such command, or if only a shell could tell one of its words.
    """
    commands, _ = _read(text, source)
    program = next((command.program for command in reversed(commands) if _trains(command.program)), None)
    if program is None:
        raise InputError(
            f"{source}: no command of a Python script with {_MODEL_FLAG}: is it a Megatron-LM script?"
        )
    if untold := next((word for word in program if any(mark in word for mark in _UNTOLD)), None):
        raise InputError(f"{source}: '{untold}': only a shell could tell; state the value in the script")
    return program


def _trains(words: tuple[str, ...]) -> bool:
    return any(word.partition("=")[0] == _MODEL_FLAG for word in words)


def _read(text: str, source: str) -> tuple[list[ScriptCommand], ScriptCommand]:
    """Return the commands of a text in their order, and the elements of all its arrays as if they were one command."""
    expander = Expander()
    try:
        commands = [command for statement in statements(text) if (command := _command(statement, expander))]
        variables = expander.texts()
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    arrays = (value for value in expander.values.values() if isinstance(value, tuple))
    return commands, ScriptCommand(words=tuple(chain.from_iterable(arrays)), variables=variables)


def _command(statement: Statement, expander: Expander) -> ScriptCommand | None:
    """Return the command of a statement; None if the statement only assigns, which changes the values."""
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
    """Return the text of a word without quotations; empty for anything else."""
    is_plain = isinstance(item, tuple) and len(item) == 1 and not item[0].quote
    return item[0].text if isinstance(item, tuple) and is_plain else ""


def _word(item: Word | Assignment | ArrayAssignment) -> Word:
    """Return an item of a command's arguments as a word; `NAME=value` assigns nothing there."""
    if isinstance(item, Assignment):
        return (Piece(f"{item.name}{'+' if item.appends else ''}=", ""), *item.value)
    return item if isinstance(item, tuple) else ()


def _continued(commands: list[ScriptCommand]) -> list[ScriptCommand]:
    """Return the commands, each with the arguments of the lines after it that begin with an argument."""
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
