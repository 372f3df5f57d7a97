"""Where code lives and what it may import: the table of sub-packages of docs/architecture.md."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pipeline": (
        ("cli",),
        ("evaluation", "views", "serving", "testing"),
        ("build",),
        ("monitoring", "execution"),
        ("planning",),
        ("recipes",),
    ),
    "workers": (
        ("tasks",),
        ("compiled",),
        ("composite", "exports"),
        ("modalities", "methods"),
        ("reconstruction", "statistics"),
        ("adapters",),
        ("checkpoints",),
        ("kernels", "families", "runtime", "generation"),
    ),
    "manifests": (
        ("maintenance", "testing"),
        ("format",),
        ("stores",),
        ("regular_file",),
        ("limits",),
        ("errors", "digest"),
        ("redaction",),
    ),
}
"""Top first: a sub-package imports only rows below its own, never its neighbours."""
DATA_MODULES = {"workers.task"}
"""Pure data that every sub-package of its package and of those above may import."""
MAX_MODULES = 20
FREE_OF_LIMIT = {"workers/methods"}
FORBIDDEN = {
    "manifests": {"torch", "ray", "transformers"},
    "workers": {"ray", "typer"},
    "pipeline": {"ray"},
}
RAY_FILES = {
    "workers/tasks/ray_remote.py",
    "pipeline/serving/actors.py",
    "pipeline/execution/ray_executor.py",
    "pipeline/monitoring/metrics.py",
    "pipeline/serving/serve.py",
    "pipeline/execution/jobs.py",
}


def _find_modules() -> dict[str, Path]:
    modules = {}
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _find_modules()
HEIGHTS = {
    f"{layer}.{name}": -position
    for position, (layer, row) in enumerate(
        (layer, row) for layer in LAYERS for row in LAYERS[layer]
    )
    for name in row
}


def imported_names(path: Path) -> set[str]:
    """Return every module that a file imports, inside functions and for type checking too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                is_module = submodule.removeprefix("mmerge.") in MODULES
                names.add(submodule if is_module else base)
    return names


def imported_modules(path: Path) -> set[str]:
    """Return the project's own modules that a file imports, without `mmerge.`."""
    names = {name.removeprefix("mmerge.") for name in imported_names(path)}
    return names & MODULES.keys()


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_there_are_files_to_check() -> None:
    assert len(MODULES) > 100


def test_every_sub_package_is_in_the_table() -> None:
    assert {folder_of(name) for name in MODULES if "." in name} - DATA_MODULES <= HEIGHTS.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_sub_packages_below_its_own(module: str) -> None:
    source = folder_of(module)
    layer = module.split(".")[0]
    names = imported_names(MODULES[module])
    assert not [name for name in names if name.split(".")[0] in LAYERS], "import mmerge.…"
    if str(MODULES[module].relative_to(ROOT)) not in RAY_FILES:
        assert not {name.split(".")[0] for name in names} & FORBIDDEN[layer]
    for target in map(folder_of, imported_modules(MODULES[module])):
        if "." not in target:
            continue  # the public interface of a package, checked as a module of its own
        if source in DATA_MODULES or target in DATA_MODULES:
            assert tuple(LAYERS).index(layer) <= tuple(LAYERS).index(target.split(".")[0])
        elif "." in source and target != source:
            assert HEIGHTS[target] < HEIGHTS[source], f"{module} imports {target}"


def find_cycles() -> list[str]:
    """Return the modules that lie on import cycles, or between two of them."""
    imports = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    remaining = set(imports)
    while True:
        imported = set().union(*(imports[name] for name in remaining)) if remaining else set()
        ends = {name for name in remaining if not imports[name] & remaining or name not in imported}
        if not ends:
            return sorted(remaining)
        remaining -= ends


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert find_cycles() == []


def test_no_folder_has_more_than_twenty_modules() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in MODULES.values())
    crowded = {folder for folder, count in counts.items() if count > MAX_MODULES + 1}
    assert crowded <= FREE_OF_LIMIT


@pytest.mark.parametrize(
    "path", sorted((ROOT / "workers" / "methods").glob("*.py")), ids=lambda path: path.name
)
def test_a_method_knows_no_path_store_clock_or_device(path: Path) -> None:
    forbidden = ("os", "pathlib", "time", "mmerge.manifests.stores", "mmerge.workers.checkpoints")
    assert not [name for name in imported_names(path) if name.startswith(forbidden)]
    assert ".cuda" not in path.read_text()
