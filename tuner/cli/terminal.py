"""The console of the commands, which shows words from foreign files without obeying them."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from tuner.printable import printable


class Terminal(Console):
    """A console that escapes unprintable characters in everything that it prints, but for its own colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See Console. Every text that is printed passes here, once it is laid out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
