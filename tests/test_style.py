"""The mechanical part of the style guide: line length, and names that carry content."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "workers", "manifests")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
EMPTY_NAMES = frozenset(
    {"found", "made", "own", "one", "other", "wanted", "known", "each", "rest", "given"}
)
"""Names that say nothing about the value (docs/style.md)."""
MAX_PER_THOUSAND = 2
MAX_COLUMNS = 100


def bound_names(path: Path) -> list[str]:
    """Return every name that a file binds: assignments, loops, comprehensions, arguments."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
    return names


def test_names_say_what_they_hold() -> None:
    names = [name for path in FILES for name in bound_names(path)]
    empty = [name for name in names if name in EMPTY_NAMES]
    assert len(empty) * 1000 <= MAX_PER_THOUSAND * len(names)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_line_is_longer_than_the_limit(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), start=1)
    assert not [number for number, line in lines if len(line) > MAX_COLUMNS]


if __name__ == "__main__":  # the files with most such names
    counts = {path: [name for name in bound_names(path) if name in EMPTY_NAMES] for path in FILES}
    for path, empty in sorted(counts.items(), key=lambda item: -len(item[1])):
        print(len(empty), path.relative_to(ROOT), sorted(set(empty)))  # noqa: T201
