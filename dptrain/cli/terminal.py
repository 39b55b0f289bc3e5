"""The terminal: a rich console on which no text can be more than text."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from dptrain.core.printable import printable


class Terminal(Console):
    """A console that spells out control characters in all that it is given to print.

    Names of classes, tensors and files come from data, and a terminal obeys what it is sent. Colours
    and the movements of a progress bar are not text and stay.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
