"""The expansion of a shell's words: variables, arrays and defaults are filled in from given values.

Nothing is run. An expansion that only a shell could tell, such as `$(nproc)` or an unknown variable, stays in its word
unchanged.
"""

import re
from collections.abc import Mapping
from typing import Final

from tuner.frameworks.megatron_lm.shell import ArrayAssignment, Assignment, Piece, Word, end_of_mark

Values = Mapping[str, str | tuple[str, ...]]
"""Values of shell variables by name: a text, or the elements of an array."""

_PARAMETER: Final = re.compile(r"\{(\w+)(\[[@*]\])?(?:(:?)[-=](.*))?\}", re.S)
_NAME: Final = re.compile(r"\w+|[@*#?$!-]")
_EXPANSION: Final = re.compile(r"[$`]")
_WHOLE_ARRAY: Final = re.compile(r"\$\{\w+\[[@*]\]\}")

_LONGEST: Final = 131_072
"""Characters that one expansion may give: Linux's longest argument (published: execve(2), MAX_ARG_STRLEN).

The limit refuses a script whose variables double at every line.
"""

_BREAK: Final = "\0"
"""The mark between the words that one expansion gives; a shell script cannot hold this character."""
_QUOTED: Final = "\1"
"""The mark in the place of a quotation, so that an empty quotation counts as a word."""


def expanded(word: Word, values: Values) -> list[str]:
    """Return the words that a word becomes: none, one, or several if a variable or an array holds several."""
    joined = "".join(_filled(piece, values) for piece in word)
    return [part.replace(_QUOTED, "") for part in joined.split(_BREAK) if part]


def assigned(assignment: Assignment | ArrayAssignment, values: Values) -> str | tuple[str, ...]:
    """Return the value that the assignment's variable has afterwards."""
    before = values.get(assignment.name, ())
    if isinstance(assignment, ArrayAssignment):
        elements = tuple(element for word in assignment.words for element in expanded(word, values))
        if not assignment.appends:
            return elements
        return (before, *elements) if isinstance(before, str) else (*before, *elements)
    undivided = tuple(Piece(piece.text, piece.quote or '"') for piece in assignment.value)
    text = " ".join(expanded(undivided, values))
    if not assignment.appends:
        return text
    return before + text if isinstance(before, str) else ("".join((*before[:1], text)), *before[1:])


def _filled(piece: Piece, values: Values) -> str:
    """Return the piece's text with its variables filled in, and with _BREAK between the words that it becomes."""
    if piece.quote == "'":
        return _QUOTED + piece.text
    parts: list[str] = []
    at = 0
    while mark := _EXPANSION.search(piece.text, at):
        parts.append(piece.text[at : mark.start()])
        text, at = _expansion(piece, mark.start(), values)
        parts.append(text)
    filled = "".join((*parts, piece.text[at:]))
    if len(filled) > _LONGEST:
        raise ValueError(f"an expansion has more than {_LONGEST:,} characters")
    # A quoted array without elements is no word, unlike a quoted variable without text.
    return filled if not piece.quote or _WHOLE_ARRAY.fullmatch(piece.text) else _QUOTED + filled


def _expansion(piece: Piece, start: int, values: Values) -> tuple[str, int]:
    """Return what the `$...` or the backticks at `start` become, and the index after them.

    An expansion that only a shell could tell becomes its own text.
    """
    text, following = piece.text, piece.text[start + 1 : start + 2]
    if text[start] == "`" or following in ("(", "{"):
        end = end_of_mark(text, start if text[start] == "`" else start + 1)
        parameter = _PARAMETER.fullmatch(text, start + 1, end)
        name, all_elements, colon, default = parameter.groups() if parameter else ("", None, None, None)
    else:
        match = _NAME.match(text, start + 1)
        end = match.end() if match else start + 1
        name, all_elements, colon, default = text[start + 1 : end], None, None, None
    value = values.get(name)
    if default is not None and (value is None or (colon and not value)):
        filled = _filled(Piece(default.replace('"', ""), piece.quote), values).replace(_QUOTED, "")
        return filled if piece.quote or '"' in default else _divided(filled), end
    if value is None:
        return text[start:end], end
    elements = (value,) if isinstance(value, str) else value if all_elements else value[:1]
    if piece.quote:
        return _BREAK.join(_QUOTED + element for element in elements), end
    return _BREAK.join(_divided(element) for element in elements), end


def _divided(text: str) -> str:
    """Return a text with _BREAK in place of its blanks, at which a shell divides an expansion outside of quotations."""
    return re.sub(r"\s+", _BREAK, text)
