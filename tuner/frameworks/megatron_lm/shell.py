"""The part of the shell's grammar that training scripts use: statements, words, quotations, arrays and variables.

A text is divided into statements, and the words of a statement are expanded with given values. Nothing is run, and
control structures are ignored: every branch of an `if` counts. An expansion that only a shell could tell, such as
`$(nproc)` or an unknown variable, stays in its word unchanged.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

Values = Mapping[str, str | tuple[str, ...]]
"""Values of shell variables by name: a text, or the elements of an array."""

_CLOSERS: Final[Mapping[str, str]] = {"(": ")", "{": "}", "'": "'", '"': '"', "`": "`"}
_BLANKS: Final = re.compile(r"(?:[ \t\r]|\\\n)*")
_COMMENT: Final = re.compile(r"#[^\n]*")
_REDIRECTION: Final = re.compile(r"\d*(?:<<<|<<-?|<>|<&|>&|>>|>\||[<>](?!\())|&>>?")
_SEPARATORS: Final = frozenset("\n;&|()")
_PLAIN: Final = re.compile(r"[^ \t\r\n'\"\\$`;&|<>()]+|\$")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_PARAMETER: Final = re.compile(r"\{(\w+)(\[[@*]\])?(?:(:?)[-=](.*))?\}", re.S)
_NAME: Final = re.compile(r"\w+|[@*#?$!-]")
_EXPANSION: Final = re.compile(r"[$`]")
_WHOLE_ARRAY: Final = re.compile(r"\$\{\w+\[[@*]\]\}")

_LONGEST: Final = 1_000_000
"""Characters that one expansion may give (assumed), so that variables which double at every line are refused."""

_DEEPEST: Final = 50
"""How deep quotations and expansions may be nested (assumed), so that no text exhausts the stack."""

_BREAK: Final = "\0"
"""Stands between the words that one expansion gives; a shell script cannot hold it."""
_QUOTED: Final = "\1"
"""Stands where a quotation was, so that an empty quotation is a word."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a word with one kind of quotation."""

    text: str
    quote: str
    """`'` (not expanded), `"` (expanded, stays one word) or empty (expanded, divided at blanks)."""


Word = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """`NAME=value`, or `NAME+=value`."""

    name: str
    appends: bool
    value: Word


@dataclass(frozen=True, slots=True)
class ArrayAssignment:
    """`NAME=(words)`, or `NAME+=(words)`."""

    name: str
    appends: bool
    words: tuple[Word, ...]


Statement = tuple[Word | Assignment | ArrayAssignment, ...]
"""A simple command: its words and assignments in their order, without its redirections."""


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a script, divided at line breaks, `;`, `&`, `|` and parentheses outside of quotations.

    Raises:
        ValueError: if a quotation or an array is not closed, or expansions are nested too deeply; says which.
    """
    text = text.replace(_BREAK, "").replace(_QUOTED, "")
    items: list[Word | Assignment | ArrayAssignment] = []
    start = _after_blanks(text, 0)
    while start < len(text):
        if redirection := _REDIRECTION.match(text, start):
            _, start = _word(text, _after_blanks(text, redirection.end()))
        elif text[start] in _SEPARATORS:
            if items:
                yield tuple(items)
            items, start = [], start + 1
        else:
            item, start = _item(text, start)
            items.append(item)
        start = _after_blanks(text, start)
    if items:
        yield tuple(items)


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


def _after_blanks(text: str, start: int) -> int:
    """Return the index of the next character that is neither a blank, a continued line nor part of a comment."""
    blanks = _BLANKS.match(text, start)
    start = blanks.end() if blanks else start
    comment = _COMMENT.match(text, start)
    return comment.end() if comment else start


def _item(text: str, start: int) -> tuple[Word | Assignment | ArrayAssignment, int]:
    """Return the word or assignment at `start`, where no blank and no separator is, and the index after it."""
    head = _ASSIGNMENT.match(text, start)
    if head is None:
        return _word(text, start)
    name, appends = head[1], bool(head[2])
    if text[head.end() : head.end() + 1] == "(":
        words, end = _array_words(text, head.end())
        return ArrayAssignment(name, appends, words), end
    value, end = _word(text, head.end())
    return Assignment(name, appends, value), end


def _array_words(text: str, start: int) -> tuple[tuple[Word, ...], int]:
    """Return the words from the parenthesis at `start` to its counterpart, and the index after that."""
    words: list[Word] = []
    at = start + 1
    while (at := _after_blanks(text, at)) < len(text):
        if text[at] == ")":
            return tuple(words), at + 1
        if text[at] in "\n;&|(<>":
            at += 1
            continue
        word, at = _word(text, at)
        words.append(word)
    raise _unclosed(text, start)


def _word(text: str, start: int) -> tuple[Word, int]:
    """Return the word at `start`, empty if none begins there, and the index after it."""
    pieces: list[Piece] = []
    at = start
    while at < len(text):
        letter, following = text[at], text[at + 1 : at + 2]
        if letter == "\\":
            pieces += [Piece(following, "'")] if following not in ("", "\n") else []
            at += 2
        elif letter == "'":
            end = _end_of_mark(text, at)
            pieces.append(Piece(text[at + 1 : end - 1], "'"))
            at = end
        elif letter == '"':
            end = _end_of_mark(text, at)
            pieces += _double_quoted(text[at + 1 : end - 1])
            at = end
        elif letter == "`" or (letter in "$<>" and following == "(") or (letter == "$" and following == "{"):
            end = _end_of_mark(text, at if letter == "`" else at + 1)
            pieces.append(Piece(text[at:end], ""))
            at = end
        elif plain := _PLAIN.match(text, at):
            pieces.append(Piece(plain[0], ""))
            at = plain.end()
        else:
            break
    return _rejoined(pieces), at


def _rejoined(pieces: list[Piece]) -> Word:
    """Return the pieces with unquoted neighbours in one piece, so that `$` meets the name after it."""
    word: list[Piece] = []
    for piece in pieces:
        if word and not word[-1].quote and not piece.quote:
            word[-1] = Piece(word[-1].text + piece.text, "")
        else:
            word.append(piece)
    return tuple(word)


def _double_quoted(text: str) -> list[Piece]:
    """Return the pieces of a text between double quotes; each character that a backslash protects is one of its own."""
    pieces: list[Piece] = []
    start = at = 0
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in ("$", "`", '"', "\\", "\n"):
            pieces.append(Piece(text[start:at], '"'))
            pieces += [Piece(text[at + 1], "'")] if text[at + 1] != "\n" else []
            start = at = at + 2
        elif text[at] == "`" or (text[at] == "$" and text[at + 1 : at + 2] in ("(", "{")):
            at = _end_of_mark(text, at if text[at] == "`" else at + 1)
        else:
            at += 1
    return [*pieces, Piece(text[start:], '"')]


def _end_of_mark(text: str, start: int) -> int:
    """Return the index after the quotation, parenthesis, brace or backtick that opens at `start`."""
    open_marks = [text[start]]
    at = start + 1
    while at < len(text):
        letter, innermost = text[at], open_marks[-1]
        if letter == _CLOSERS[innermost]:
            open_marks.pop()
            if not open_marks:
                return at + 1
        elif innermost == "'":
            pass
        elif letter == "\\":
            at += 1
        elif _opens(letter, text[at - 1], innermost):
            open_marks.append(letter)
            if len(open_marks) > _DEEPEST:
                raise ValueError(f"expansions are nested more than {_DEEPEST} deep")
        at += 1
    raise _unclosed(text, start)


def _opens(letter: str, before: str, innermost: str) -> bool:
    """Return whether a character opens another mark inside of the mark `innermost`."""
    if letter == "'":
        return innermost != '"'
    if letter in "({":
        return before == "$" or letter == innermost == "("
    return letter in '"`'


def _unclosed(text: str, start: int) -> ValueError:
    line = text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0]
    return ValueError(f"a quotation or an array is not closed: {line.strip()[:100]}")


def _filled(piece: Piece, values: Values) -> str:
    """Return the piece's text with its variables filled in, and with breaks between the words that it becomes."""
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
        end = _end_of_mark(text, start if text[start] == "`" else start + 1)
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
    """Return a text with a break in place of its blanks, as an expansion outside of quotations is divided."""
    return re.sub(r"\s+", _BREAK, text)
