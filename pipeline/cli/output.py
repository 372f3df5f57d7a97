"""The two streams that commands print to, and a progress bar for bytes.

What is printed may hold text of other people: names of files and tensors, answers of a model. All
of it passes `escape_controls` (mmerge.pipeline.monitoring.printable).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment

from mmerge.pipeline.monitoring.printable import escape_controls


class PlainConsole(Console):
    """A console that escapes control characters in whatever is printed."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of a renderable; those with control codes of rich stay as they are."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)


out = PlainConsole(soft_wrap=True)
err = PlainConsole(stderr=True, soft_wrap=True)


def print_text(text: str, *, end: str = "\n") -> None:
    """Print a text of other people to stdout at once, such as an answer of a model."""
    print(escape_controls(text), end=end, flush=True)


class ByteBar:
    """Bytes done and bytes per second; does nothing without a display."""

    def __init__(self, display: Progress | None, label: str) -> None:
        self._display = display
        self._task = TaskID(0) if display is None else display.add_task(label, total=None)

    def advance(self, num_bytes: int) -> None:
        """Add bytes to those done."""
        if self._display is not None:
            self._display.advance(self._task, num_bytes)

    def update(self, num_done: int, total: int) -> None:
        """Set the bytes done and their total."""
        if self._display is not None:
            self._display.update(self._task, completed=num_done, total=total)


@contextmanager
def show_bytes(label: str, *, enabled: bool = True) -> Iterator[ByteBar]:
    """Show a progress bar while the context lasts, where stderr is a terminal."""
    if not enabled or not err.is_terminal:
        yield ByteBar(None, label)
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as display:
        yield ByteBar(display, label)
