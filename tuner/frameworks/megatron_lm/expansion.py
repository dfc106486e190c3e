"""The expansion of a shell's words: variables, arrays and defaults are filled in from the values that a script assigns.

Nothing is run. An expansion that only a shell could tell, such as `$(nproc)` or an unknown variable, stays in its word
unchanged.
"""

import re
from typing import Final

from tuner.frameworks.megatron_lm.shell import ArrayAssignment, Assignment, Piece, Word, end_of_mark

_PARAMETER: Final = re.compile(r"\{(\w+)(\[[@*]\])?(?:(:?)[-=](.*))?\}", re.S)
_NAME: Final = re.compile(r"\w+|[@*#?$!-]")
_EXPANSION: Final = re.compile(r"[$`]")
_WHOLE_ARRAY: Final = re.compile(r"\$\{\w+\[[@*]\]\}")

_MOST_CHARACTERS: Final = 1 << 22
"""Characters that all expansions of one script may give together. Assumed: training scripts give about ten thousand.
The limit refuses a script whose variables or arrays double at every line."""
_WORD_CHARACTERS: Final = 16
"""Characters that a word counts as beside its text, since each takes memory; so does a variable that is recorded with
a command."""

_BREAK: Final = "\0"
"""The mark between the words that one expansion gives; a shell script cannot hold this character."""
_QUOTED: Final = "\1"
"""The mark in the place of a quotation, so that an empty quotation counts as a word."""


class Expander:
    """The variables of one script while it is read, and the expansion of its words; all of it is bounded in size.

    Every method raises ValueError once the expansions of the script give more than `_MOST_CHARACTERS` together.
    """

    def __init__(self) -> None:
        self.values: dict[str, str | tuple[str, ...]] = {}
        self._left = _MOST_CHARACTERS

    def expanded(self, word: Word) -> list[str]:
        """Return the words that a word becomes: none, one, or several if a variable or an array holds several."""
        joined = "".join(self._filled(piece) for piece in word)
        self._spend(joined.count(_BREAK) * _WORD_CHARACTERS + _WORD_CHARACTERS)
        return [part.replace(_QUOTED, "") for part in joined.split(_BREAK) if part]

    def assigned(self, assignment: Assignment | ArrayAssignment) -> str | tuple[str, ...]:
        """Return the value that the assignment's variable has afterwards; `values` does not change."""
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
        """Return the variables that hold a text and are no arrays, with their values now."""
        self._spend(len(self.values) * _WORD_CHARACTERS)
        return {name: value for name, value in self.values.items() if isinstance(value, str)}

    def _spend(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise ValueError(f"its expansions give more than {_MOST_CHARACTERS:,} characters")

    def _filled(self, piece: Piece) -> str:
        """Return the piece's text with its variables filled in, and with _BREAK between the words that it becomes."""
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
    """Return a text with _BREAK in place of its blanks, at which a shell divides an expansion outside of quotations."""
    return re.sub(r"\s+", _BREAK, text)
