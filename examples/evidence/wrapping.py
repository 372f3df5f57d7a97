"""Markdown source wrapped at 100 columns."""

from __future__ import annotations

import textwrap

COLUMNS = 100


def wrap_page(text: str) -> str:
    """Return Markdown with paragraphs and list items wrapped; tables, headings and images stay."""
    return "\n".join(_wrap_line(line) for line in text.split("\n"))


def _wrap_line(line: str) -> str:
    if line.startswith(("|", "#", "!")) or len(line) <= COLUMNS:
        return line
    return textwrap.fill(
        line,
        COLUMNS,
        subsequent_indent="  " if line.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
