"""Words from a file that somebody else may have written, made fit to be shown on a terminal or on a page."""

import re
from typing import Annotated, Final

from pydantic import AfterValidator

_KEPT: Final = "\n\t"
"""The characters that lay out a text of several lines."""

_INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters without a shape of their own that `str.isprintable` counts as printable. Published: Unicode's property
Default_Ignorable_Code_Point, and the empty Braille pattern."""


def printable(text: str) -> str:
    """Return a text with an escape such as `\\x1b` in place of each character that shows nothing by itself.

    Such characters move the cursor, change the direction of writing, or make two different names look equal. Line
    breaks and tabs are kept.
    """
    return _escaped(text, _KEPT)


def one_line(text: str) -> str:
    """Return a text as `printable` does, but with its line breaks and tabs escaped too.

    A name with line breaks would add lines that look like our own.
    """
    return _escaped(text, "")


OneLine = Annotated[str, AfterValidator(one_line)]
"""A text in a file that is read as a single printable line: a name, a reason, a version. Words that run are no such
text, since they must stay as they are."""


def _escaped(text: str, kept: str) -> str:
    if text.isprintable() and (text.isascii() or not _INVISIBLE.search(text)):
        return text
    return "".join(letter if letter in kept or _is_shown(letter) else _escape(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    return letter.isprintable() and not _INVISIBLE.match(letter)


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
