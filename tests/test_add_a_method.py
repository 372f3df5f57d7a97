"""The page on adding a method, run as it stands: installed wheels, outside of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from build_digests import make_checkpoints
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "add-a-method.md").read_text()
BLOCKS = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, flags=re.DOTALL))
EXPERTS = ("image", "audio", "video")


@dataclass(frozen=True)
class Installation:
    """A virtual environment with both wheels, and a folder that holds the checkpoints alone."""

    python: Path
    folder: Path

    def run(self, *arguments: str) -> str:
        """Return what `mmerge ARGUMENTS` prints; fail with its errors."""
        mmerge = self.python.with_name("mmerge")
        return call([str(mmerge), *arguments], folder=self.folder)


def call(command: list[str], *, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_sources(target: Path) -> Path:
    """Copy what a wheel is built from, so that building leaves nothing in the repository."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("pipeline", "workers", "manifests"):
        shutil.copytree(ROOT / package, target / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    path = tmp_path_factory.mktemp("method")
    sources = copy_sources(path / "mmerge")
    package = path / "median-merge"
    package.mkdir()
    for name in ("median_merge.py", "pyproject.toml"):
        (package / name).write_text(BLOCKS[name])
    venv.create(path / "venv", with_pip=False)
    python = path / "venv" / "bin" / "python"
    (site_packages,) = (path / "venv" / "lib").glob("python*/site-packages")
    shared = Path(torch.__file__).resolve().parent.parent
    (site_packages / "shared.pth").write_text(f"{shared}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--ignore-installed"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    call([*pip, *options, str(sources), str(package)], folder=path)
    folder = path / "empty"
    folder.mkdir()
    make_checkpoints(folder)
    return Installation(python, folder)


def read_merged(store: Path) -> dict[str, torch.Tensor]:
    """Return the merged tensors of a build, read from its objects."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (store / "objects").rglob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            is_merged = "method" in opened.metadata()
        if is_merged:
            tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("executor", ["serial", "processes"])
@pytest.mark.parametrize("method", ["median", "trimmed_sum"])
def test_the_methods_of_the_page_merge_as_a_naive_computation(
    method: str, executor: str, installation: Installation
) -> None:
    recipe = yaml.safe_load(BLOCKS["recipe.yaml"])
    store = f"{method}-{executor}"
    recipe |= {"method": method, "output": store}
    path = installation.folder / f"{store}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    installation.run("run", path.name, "--executor", executor)
    merged = read_merged(installation.folder / store)
    base = load_file(installation.folder / "base" / "model.safetensors")
    experts = [load_file(installation.folder / name / "model.safetensors") for name in EXPERTS]
    deltas: dict[str, torch.Tensor] = {}
    for name, value in base.items():
        rows = [expert[f"language_model.{name}"][: len(value)].float() for expert in experts]
        deltas[name] = torch.stack(rows) - value.float()
    if method == "trimmed_sum":
        deltas = trim_naively(deltas, density=0.2)
    for name, value in base.items():
        total = deltas[name].sum(0) if method == "trimmed_sum" else deltas[name].median(0).values
        expected = (value.float() + 0.5 * total).to(torch.bfloat16)
        assert torch.equal(merged[name], expected), name


def trim_naively(deltas: dict[str, torch.Tensor], *, density: float) -> dict[str, torch.Tensor]:
    """Zero what lies below each expert's threshold, the magnitude of rank N − int(density·N)."""
    everything = torch.cat([delta.reshape(len(EXPERTS), -1) for delta in deltas.values()], dim=1)
    magnitudes = everything.abs().sort(dim=1).values
    rank = magnitudes.shape[1] - int(density * magnitudes.shape[1])
    thresholds = magnitudes[:, rank - 1]
    trimmed = {}
    for name, delta in deltas.items():
        threshold = thresholds.reshape(-1, *[1] * (delta.ndim - 1))
        trimmed[name] = torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))
    return trimmed


def test_the_command_line_lists_installed_methods(installation: Installation) -> None:
    assert "trimmed_sum" in installation.run("methods")


def test_the_compiled_pass_of_existing_rules_is_used(installation: Installation) -> None:
    code = """
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import TensorFacts
from mmerge.workers.compiled.interface import PassRequest, find_compiled_pass
method = find_method("trimmed_sum")
experts = [method.expert_parameters_model()] * 2
facts = TensorFacts("w", (4,), (0.1, 0.1), ("a", "b"), {})
request = PassRequest(method, method.parameters_model(), experts, facts, 0, "BF16")
assert find_compiled_pass(request) is not None
"""
    call([str(installation.python), "-c", code], folder=installation.folder)
