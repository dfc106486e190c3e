"""Parses the part of the shell's grammar that training scripts use: statements, words, quotations and arrays.

Control structures are ignored: all branches of an `if` are read, one after the other.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Final

_CLOSERS: Final[Mapping[str, str]] = {"(": ")", "{": "}", "'": "'", '"': '"', "`": "`"}
_BLANKS: Final = re.compile(r"(?:[ \t\r]|\\\n)*")
_COMMENT: Final = re.compile(r"#[^\n]*")
_REDIRECTION: Final = re.compile(r"\d*(?:<<<|<<-?|<>|<&|>&|>>|>\||[<>](?!\())|&>>?")
_SEPARATORS: Final = frozenset("\n;&|()")
_PLAIN: Final = re.compile(r"[^ \t\r\n'\"\\$`;&|<>()]+|\$")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_DEEPEST: Final = 50
"""How deep quotations and expansions may be nested, so that no text exhausts the stack. Assumed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a word whose characters are all quoted in the same way."""

    text: str
    quote: str
    """`'` if the text is not expanded; `"` if it is expanded and stays one word; empty if it is not quoted, so that it
    is expanded and split at blanks."""


Word = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The assignment `NAME=value`, or `NAME+=value` if `appends`."""

    name: str
    appends: bool
    value: Word


@dataclass(frozen=True, slots=True)
class ArrayAssignment:
    """The assignment of an array `NAME=(words)`, or `NAME+=(words)` if `appends`."""

    name: str
    appends: bool
    words: tuple[Word, ...]


Statement = tuple[Word | Assignment | ArrayAssignment, ...]
"""A simple command of the shell: its words and assignments in their order, without redirections."""


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a script, separated by unquoted line breaks, `;`, `&`, `|` and parentheses.

    Raises:
        ValueError: naming a quotation or an array that is not closed, or if expansions are nested too deeply.
    """
    text = text.replace("\0", "")  # as a shell does
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


def _after_blanks(text: str, start: int) -> int:
    """Return the first index from `start` on that is not in a blank, a backslash with a line break, or a comment."""
    blanks = _BLANKS.match(text, start)
    start = blanks.end() if blanks else start
    comment = _COMMENT.match(text, start)
    return comment.end() if comment else start


def _item(text: str, start: int) -> tuple[Word | Assignment | ArrayAssignment, int]:
    """Return the word or assignment that begins at `start`, and the index after it."""
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
    """Return the words in the parentheses that open at `start`, and the index after the closing parenthesis."""
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
    """Return the word that begins at `start`, or an empty one if none begins there, and the index after it."""
    pieces: list[Piece] = []
    at = start
    while at < len(text):
        letter, following = text[at], text[at + 1 : at + 2]
        if letter == "\\":
            pieces += [Piece(following, "'")] if following not in ("", "\n") else []
            at += 2
        elif letter == "'":
            end = end_of_mark(text, at)
            pieces.append(Piece(text[at + 1 : end - 1], "'"))
            at = end
        elif letter == '"':
            end = end_of_mark(text, at)
            pieces += _double_quoted(text[at + 1 : end - 1])
            at = end
        elif letter == "`" or (letter in "$<>" and following == "(") or (letter == "$" and following == "{"):
            end = end_of_mark(text, at if letter == "`" else at + 1)
            pieces.append(Piece(text[at:end], ""))
            at = end
        elif plain := _PLAIN.match(text, at):
            pieces.append(Piece(plain[0], ""))
            at = plain.end()
        else:
            break
    return _rejoined(pieces), at


def _rejoined(pieces: list[Piece]) -> Word:
    """Return the pieces after joining unquoted neighbours, so that a `$` and the name after it are in one piece."""
    word: list[Piece] = []
    for is_quoted, neighbours in groupby(pieces, key=lambda piece: bool(piece.quote)):
        run = list(neighbours)
        word += run if is_quoted else [Piece("".join(piece.text for piece in run), "")]
    return tuple(word)


def _double_quoted(text: str) -> list[Piece]:
    """Return the pieces of a text between double quotes; each character after a backslash becomes a separate piece."""
    pieces: list[Piece] = []
    start = at = 0
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in ("$", "`", '"', "\\", "\n"):
            pieces.append(Piece(text[start:at], '"'))
            pieces += [Piece(text[at + 1], "'")] if text[at + 1] != "\n" else []
            start = at = at + 2
        elif text[at] == "`" or (text[at] == "$" and text[at + 1 : at + 2] in ("(", "{")):
            at = end_of_mark(text, at if text[at] == "`" else at + 1)
        else:
            at += 1
    return [*pieces, Piece(text[start:], '"')]


def end_of_mark(text: str, start: int) -> int:
    """Return the index after the end of the quotation, parenthesis, brace or backtick that opens at index `start`.

    Raises:
        ValueError: if it is not closed, or others are nested too deeply in it.
    """
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
    """Return whether a character opens a further quotation, parenthesis, brace or backtick inside `innermost`.

    Args:
        letter: The character.
        before: The character before it.
        innermost: The opening character of the innermost one that is open.
    """
    if letter == "'":
        return innermost != '"'
    if letter in "({":
        return before == "$" or letter == innermost == "("
    return letter in '"`'


def _unclosed(text: str, start: int) -> ValueError:
    line = text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0]
    return ValueError(f"a quotation or an array is not closed: {line.strip()[:100]}")
