"""The one form of table that all commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def make_table(*texts: str, numbers: Sequence[str] = (), title: str | None = None) -> Table:
    """Return an empty table: columns of texts, then columns of numbers, which align right."""
    table = Table(*texts, box=None, header_style="bold", pad_edge=False, title=title)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
