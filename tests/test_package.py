"""What is installed is what is here, under one name only."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from mmerge import pipeline

ROOT = Path(__file__).resolve().parent.parent
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_every_folder_with_code_is_listed_in_pyproject() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    layers = ("pipeline", "workers", "manifests")
    folders = {
        path.parent.relative_to(ROOT) for layer in layers for path in (ROOT / layer).rglob("*.py")
    }
    assert set(tool["packages"]) == {"mmerge." + ".".join(folder.parts) for folder in folders}
    assert tool["package-dir"] == {f"mmerge.{layer}": layer for layer in layers}


@pytest.mark.parametrize("folder", ["pipeline", "workers", "manifests"])
def test_a_bare_import_from_the_repository_is_refused(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"import 'mmerge.{folder}'" in done.stderr


@pytest.mark.parametrize("name", pipeline.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(pipeline, name).__doc__


def test_a_function_is_not_hidden_by_a_module_of_its_name() -> None:
    for name in ("run", "export", "verify", "make_plan", "load_composite"):
        importlib.import_module("mmerge.pipeline.build.run")
        assert callable(getattr(pipeline, name))


def test_help_does_not_load_heavy_modules() -> None:
    code = (
        "import sys; from mmerge.pipeline.cli.main import main\ntry: main(['--help'])\nexcept"
        " SystemExit: pass\nprint([m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'numpy',"
        " 'pydantic', 'rich.console') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_kernels_are_loaded_without_torch() -> None:
    code = (
        "import sys; from mmerge.workers.tasks.worker_startup import load_kernels; load_kernels();"
        " print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_manifests_can_be_read_without_torch_or_ray() -> None:
    code = (
        "import sys; import mmerge.manifests.maintenance.verify; print([m for m in ('torch', 'ray',"
        " 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
