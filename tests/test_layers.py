"""Where a line of code lives: infra → pipeline → workers → manifests, and what each may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("manifests", "workers", "pipeline")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FORBIDDEN = {"manifests": {"torch", "ray", "transformers"}, "workers": {"ray", "typer"}, "pipeline": set()}
RAY_FILES = {
    "workers/tasks/ray_remote.py",
    "pipeline/serving/actors.py",
    "pipeline/execution/executor.py",
    "pipeline/monitoring/metrics.py",
    "pipeline/serving/serve.py",
    "pipeline/execution/jobs.py",
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_file_imports_only_from_its_own_layer_or_below(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    names = imported(path)
    assert not [name for name in names if any(name.startswith(f"mmerge.{other}") for other in above)]
    assert not [name for name in names if name.split(".")[0] in LAYERS], "import mmerge.…, not the bare folder"
    if str(path.relative_to(ROOT)) not in RAY_FILES:
        assert not {name.split(".")[0] for name in names} & FORBIDDEN[layer]
        assert "ray" not in {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted((ROOT / "workers" / "methods").glob("*.py")), ids=lambda path: path.name)
def test_a_method_knows_no_path_store_clock_or_device(path: Path) -> None:
    forbidden = ("os", "pathlib", "time", "mmerge.manifests.stores.object_store", "mmerge.workers.checkpoints.checkpoint")
    assert not [name for name in imported(path) if name in forbidden]
    assert ".cuda" not in path.read_text()
