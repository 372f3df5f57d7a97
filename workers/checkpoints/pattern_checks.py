"""Regular expressions of checkpoints, whose engines backtrack."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOUNDS = re.compile(r"\{(\d*)(,?)(\d*)\}")
_MAX_REPEATS = 1000
"""A group repeated more often counts as repeated without bound."""


@dataclass
class _Group:
    start: int
    is_ambiguous: bool = False
    """Whether it repeats something, or branches: it may match one text in several ways."""


def find_costly_part(pattern: str) -> str:
    """Return the first group that repeats without bound and itself repeats or branches, or "".

    Such a group can match a text of n characters in exponentially many ways, all of which a
    backtracking engine tries. Works on the text alone, for the syntax of Python and Oniguruma.
    """
    groups = [_Group(0)]
    last_group: tuple[int, bool] | None = None
    """Start and ambiguity of the group that ends just before the current character."""
    position = 0
    while position < len(pattern):
        character = pattern[position]
        closed, last_group = last_group, None
        if character == "\\":
            position += 2
        elif character == "[":
            position = _skip_class(pattern, position)
        elif character == "(":
            groups.append(_Group(position))
            position += 1
            if pattern[position : position + 1] == "?":  # the ? of (?:, (?=, (?i: is no repeat
                position += 1
        elif character == ")":
            group = groups.pop() if len(groups) > 1 else groups[0]
            last_group = (group.start, group.is_ambiguous)
            groups[-1].is_ambiguous |= group.is_ambiguous
            position += 1
        elif character == "|":
            groups[-1].is_ambiguous = True
            position += 1
        elif character in "*+?{":
            length, is_unbounded = _read_repeat(pattern, position)
            if length:
                if is_unbounded and closed is not None and closed[1]:
                    return pattern[closed[0] : position + length]
                groups[-1].is_ambiguous = True
            position += length or 1
        else:
            position += 1
    return ""


def _read_repeat(pattern: str, position: int) -> tuple[int, bool]:
    """Return the length of a quantifier with its suffixes, and whether it has no bound."""
    character = pattern[position]
    length, is_unbounded = 1, character in "*+"
    if character == "{":
        bounds = _BOUNDS.match(pattern, position)
        if bounds is None or not (bounds[1] or bounds[3]):
            return 0, False
        length = len(bounds[0])
        highest = bounds[3] if bounds[2] else bounds[1]
        is_unbounded = not highest or len(highest) > 6 or int(highest) > _MAX_REPEATS
    while pattern[position + length : position + length + 1] in ("?", "+", "*"):
        # Lazy and possessive, or (Oniguruma) a quantifier of a quantifier.
        is_unbounded |= pattern[position + length] == "*"
        length += 1
    return length, is_unbounded


def _skip_class(pattern: str, position: int) -> int:
    """Return the position after a character class, which Oniguruma lets contain classes."""
    depth = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "[":
            depth += 1
            following = pattern[position + 1 : position + 3]
            # A bracket right after [ or [^ stands for itself.
            position += 2 if following == "^]" else 1 if following[:1] == "]" else 0
        elif character == "]":
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    return position
