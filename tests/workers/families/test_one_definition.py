"""Tensor names and the rules that read them stand in one place only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from architectures import ARCHITECTURES, make_model

ROOT = Path(__file__).resolve().parent.parent.parent.parent
FILES = sorted(
    path for name in ("pipeline", "workers", "manifests") for path in (ROOT / name).rglob("*.py")
)
FAMILIES = ROOT / "workers" / "families"
LAYER_PATTERN = re.compile(r"(?<!\w)layers\\?\.")
TENSOR_NAMES = re.compile(
    r"_proj\b|\bc_fc\b|\bdense_(h_to_4h|4h_to_h)\b|\bquery_key_value\.|embed_tokens|\bembed_(in|out)\b"
    r"|\blm_head\b"
)
SHARD_NAMES = "pipeline/planning/shards.py"
"""Names shards `layers.3`, which is no pattern of tensor names."""


def code_strings(path: Path) -> Iterator[str]:
    """Yield the string constants of a file that are no docstrings and no texts for people."""
    tree = ast.parse(path.read_text())
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            texts |= {id(child) for child in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


def files_with(pattern: re.Pattern[str]) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(pattern.search(text) and " " not in text for text in code_strings(path))
    }


def calls(path: Path, name: str) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_the_layer_name_pattern_is_in_one_module() -> None:
    assert files_with(LAYER_PATTERN) - {SHARD_NAMES} == {"manifests/format/tensor_names.py"}


def test_names_of_projections_embeddings_and_heads_are_in_families_only() -> None:
    files = files_with(TENSOR_NAMES)
    assert "workers/families/llama.py" in files
    assert {name for name in files if not name.startswith("workers/families/")} == set()


def test_one_module_decides_which_linear_layers_are_routed() -> None:
    asking = {str(path.relative_to(ROOT)) for path in FILES if calls(path, "is_routed_linear")}
    assert asking == {"workers/composite/weight_items.py"}


def test_the_pattern_finds_the_names_of_real_classes() -> None:
    for architecture in ARCHITECTURES:
        names = [name for name, _ in make_model(architecture).named_parameters()]
        assert any(LAYER_PATTERN.search(name) for name in names)
        assert any(TENSOR_NAMES.search(name) for name in names)
