"""Expands the words of a shell script: replaces `$NAME`, `${ARRAY[@]}` and defaults by values that the script assigns.

Nothing is run. An expansion whose value only a running shell knows, such as `$(nproc)` or a variable that the script
does not assign, stays in its word unchanged.
"""

import re
from typing import Final

from tuner.frameworks.megatron_lm.shell import ArrayAssignment, Assignment, Piece, Word, end_of_mark

_PARAMETER: Final = re.compile(r"\{(\w+)(\[[@*]\])?(?:(:?)[-=](.*))?\}", re.S)
_NAME: Final = re.compile(r"\w+|[@*#?$!-]")
_EXPANSION: Final = re.compile(r"[$`]")
_WHOLE_ARRAY: Final = re.compile(r"\$\{\w+\[[@*]\]\}")

_MOST_CHARACTERS: Final = 1 << 22
"""The most characters that all expansions of one script may produce together. Assumed: training scripts produce about
ten thousand. The limit refuses a script whose variables or arrays double at every line."""
_WORD_CHARACTERS: Final = 16
"""The number of characters that each word, and each variable recorded with a command, counts in addition to its text,
since even an empty one takes memory. Assumed."""

_BREAK: Final = "\0"
"""Separates the words that one expansion produces; a shell script cannot contain this character."""
_QUOTED: Final = "\1"
"""Stands before quoted text, so that an empty quotation counts as a word."""


class Expander:
    """Expands the words of one script, with the values (`values`) that its variables have at the point reached so far.

    Every method raises ValueError once the expansions of the script have produced more than `_MOST_CHARACTERS`.
    """

    def __init__(self) -> None:
        self.values: dict[str, str | tuple[str, ...]] = {}
        self._left = _MOST_CHARACTERS

    def expanded(self, word: Word) -> list[str]:
        """Return the words into which a word expands: none, one, or several if a variable or array holds several."""
        joined = "".join(self._filled(piece) for piece in word)
        self._spend(joined.count(_BREAK) * _WORD_CHARACTERS + _WORD_CHARACTERS)
        return [part.replace(_QUOTED, "") for part in joined.split(_BREAK) if part]

    def assigned(self, assignment: Assignment | ArrayAssignment) -> str | tuple[str, ...]:
        """Return the value that a variable has after an assignment, without changing `values`.

        The value is a text, or a tuple of texts for an array.
        """
        before = self.values.get(assignment.name, ()) if assignment.appends else ()
        if isinstance(assignment, ArrayAssignment):
            elements = tuple(element for word in assignment.words for element in self.expanded(word))
            if not assignment.appends:
                return elements
            earlier = (before,) if isinstance(before, str) else before
            self._spend(len(earlier) * _WORD_CHARACTERS)
            return (*earlier, *elements)
        undivided = tuple(Piece(piece.text, piece.quote or '"') for piece in assignment.value)
        text = " ".join(self.expanded(undivided))
        if not assignment.appends:
            return text
        if isinstance(before, str):
            self._spend(len(before))
            return before + text
        self._spend(len(before) * _WORD_CHARACTERS + sum(map(len, before[:1])))
        return ("".join((*before[:1], text)), *before[1:])

    def texts(self) -> dict[str, str]:
        """Return the present values of the variables that are not arrays, by name."""
        self._spend(len(self.values) * _WORD_CHARACTERS)
        return {name: value for name, value in self.values.items() if isinstance(value, str)}

    def _spend(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise ValueError(f"its expansions give more than {_MOST_CHARACTERS:,} characters")

    def _filled(self, piece: Piece) -> str:
        """Return a piece's text after expansion, with _BREAK between words and _QUOTED before quoted text."""
        self._spend(len(piece.text))
        if piece.quote == "'":
            return _QUOTED + piece.text
        parts: list[str] = []
        at = 0
        while mark := _EXPANSION.search(piece.text, at):
            parts.append(piece.text[at : mark.start()])
            text, at = self._expansion(piece, mark.start())
            parts.append(text)
        parts.append(piece.text[at:])
        self._spend(sum(map(len, parts)))
        filled = "".join(parts)
        # A quoted array without elements is no word, unlike a quoted variable without text.
        return filled if not piece.quote or _WHOLE_ARRAY.fullmatch(piece.text) else _QUOTED + filled

    def _expansion(self, piece: Piece, start: int) -> tuple[str, int]:
        """Expand the `$...` or the backticks that begin at index `start` of a piece's text.

        Returns:
            The text after expansion, unchanged if only a running shell knows the value; and the index after the `$...`
            or the backticks.
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
        value = self.values.get(name)
        if default is not None and (value is None or (colon and not value)):
            filled = self._filled(Piece(default.replace('"', ""), piece.quote)).replace(_QUOTED, "")
            return filled if piece.quote or '"' in default else _divided(filled), end
        if value is None:
            return text[start:end], end
        elements = (value,) if isinstance(value, str) else value if all_elements else value[:1]
        self._spend(sum(map(len, elements)) + len(elements) * _WORD_CHARACTERS)
        if piece.quote:
            return _BREAK.join(_QUOTED + element for element in elements), end
        return _BREAK.join(_divided(element) for element in elements), end


def _divided(text: str) -> str:
    """Return a text with _BREAK in place of its blanks, at which a shell splits an unquoted expansion into words."""
    return re.sub(r"\s+", _BREAK, text)
