"""The one form of table that all commands print; its cells are data, never markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mmerge.pipeline.monitoring.printable import escape, escape_controls


class DataTable(Table):
    """A table whose cells are printed as they are, without control characters."""

    def add_data(self, *cells: str) -> None:
        """Add a row of texts."""
        self.add_row(*(Text(escape_controls(cell)) for cell in cells))


def make_table(*texts: str, numbers: Sequence[str] = (), title: str | None = None) -> DataTable:
    """Return an empty table: columns of texts, then columns of numbers, which align right."""
    columns = map(escape, texts)
    table = DataTable(*columns, box=None, header_style="bold", pad_edge=False, title=title)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
