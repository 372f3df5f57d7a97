"""Text of other people, made harmless before it is printed or logged."""

from __future__ import annotations

import logging
import unicodedata

from typing_extensions import override

from mmerge.manifests.redaction import redact

_KEPT = "\n\t"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: controls, formats (bidirectional marks, zero widths), halves of surrogate
pairs, and separators of lines and paragraphs.
"""


def escape_controls(text: str) -> str:
    """Return a text whose control characters are written as Python writes them, redacted.

    An escape sequence of a terminal, a bidirectional mark or a carriage return in a name could
    hide, or replace, what stands beside it. Line breaks and tabs are kept.
    """
    text = redact(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()


def escape(text: str) -> str:
    """Return a text for a rich console: controls escaped, markup not interpreted."""
    from rich import markup

    return markup.escape(escape_controls(text))


class PlainFormatter(logging.Formatter):
    """Log lines for people, without control characters and secrets."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))
