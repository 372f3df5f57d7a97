"""No call into transformers may run the code of a checkpoint, or ask on the terminal to do so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("manifests", "workers", "pipeline", "examples", "benchmarks", "infra", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def find_calls(path: Path) -> list[ast.Call]:
    """Return the calls of `….from_pretrained(…)` in a file."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]


def forbids_code(call: ast.Call) -> bool:
    return any(
        keyword.arg == "trust_remote_code"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is False
        for keyword in call.keywords
    )


def test_there_are_calls_to_check() -> None:
    assert sum(len(find_calls(path)) for path in FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_call_forbids_code_of_the_checkpoint(path: Path) -> None:
    allowing = [call.lineno for call in find_calls(path) if not forbids_code(call)]
    assert allowing == []
