"""What can change the bytes of an object is part of its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.build import task_factory
from mmerge.workers.methods import find_method
from mmerge.workers.methods.registry import method_names, register_method, unregister_method
from mmerge.workers.runtime import math_library
from mmerge.workers.runtime.method_source import digest_source

METHOD = """
from mmerge.workers.methods.interface import Block, MergedBlock, Method
{imports}

class Median(Method):
    name = "identity_median"
    kind = "plain"
    source = "a test"

    def granularity(self, parameters, experts):
        return "{granularity}"

    def merge_block(self, block, parameters, experts):
        return MergedBlock((block.experts[0] * {factor}).to(block.dtype))
"""

Keys = dict[str, str]
Build = Callable[..., Keys]


@pytest.fixture
def build(lab: Any) -> Build:
    raw = lab.make_all(2)

    def build_it(**changes: Any) -> Keys:
        report = run(make_plan(read_recipe(lab.write_recipe(raw | changes))))
        assert report.manifest is not None
        return {entry.shard: entry.key for entry in report.manifest.entries}

    return build_it


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, str]], type]]:
    """Return a function that writes a package, and registers and returns its method."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def install(files: dict[str, str]) -> type:
        for name in [name for name in sys.modules if name.partition(".")[0] == "identity_package"]:
            del sys.modules[name]
        for name, text in files.items():
            path = tmp_path / "identity_package" / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)
        importlib.invalidate_caches()
        method_class = importlib.import_module("identity_package.median").Median
        if "identity_median" in method_names():
            unregister_method("identity_median")
        register_method(method_class())
        assert isinstance(method_class, type)
        return method_class

    yield install
    if "identity_median" in method_names():
        unregister_method("identity_median")
    for name in [name for name in sys.modules if name.partition(".")[0] == "identity_package"]:
        del sys.modules[name]


def method_text(*, factor: str = "1", imports: str = "", granularity: str = "entry") -> str:
    return METHOD.format(factor=factor, imports=imports, granularity=granularity)


def merged(keys: Keys) -> set[str]:
    return {key for shard, key in keys.items() if "/" not in shard}


def test_other_code_of_a_third_party_method_makes_other_objects(
    build: Build, package: Callable[[dict[str, str]], type]
) -> None:
    package({"__init__.py": "", "median.py": method_text()})
    first = build(method="identity_median")
    package({"__init__.py": "", "median.py": method_text()})
    assert build(method="identity_median") == first
    package({"__init__.py": "", "median.py": method_text(factor="2")})
    assert not merged(build(method="identity_median")) & merged(first)


def test_a_helper_module_of_the_package_is_part_of_its_code(
    package: Callable[[dict[str, str]], type],
) -> None:
    text = method_text(factor="FACTOR", imports="from identity_package.deep.helper import FACTOR")
    digests = []
    for factor in ("1", "2"):
        files = {"__init__.py": "", "deep/__init__.py": "", "median.py": text}
        digests.append(digest_source(package(files | {"deep/helper.py": f"FACTOR = {factor}"})))
    assert digests[0] != digests[1]


def test_a_class_above_in_another_package_is_part_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "identity_leaf.py").write_text(
        "import identity_above\nclass Leaf(identity_above.Median):\n    name = 'leaf'\n"
    )
    digests = []
    for factor in ("1", "2"):
        (tmp_path / "identity_above.py").write_text(method_text(factor=factor))
        importlib.invalidate_caches()
        for name in ("identity_leaf", "identity_above"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        digests.append(digest_source(importlib.import_module("identity_leaf").Leaf))
    assert None not in digests
    assert digests[0] != digests[1]


@pytest.mark.parametrize("name", method_names())
def test_built_in_methods_have_versions_instead_of_a_source(name: str) -> None:
    assert digest_source(type(find_method(name))) is None


def test_another_arithmetic_version_makes_other_objects(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build()
    version = task_factory.ARITHMETIC_VERSION
    monkeypatch.setattr(task_factory, "ARITHMETIC_VERSION", version + 1)
    assert not set(build().values()) & set(first.values())


def use_library(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(math_library, "_find_math_library", lambda device: f"{text} {device}")


def test_another_math_library_makes_other_objects_of_whole_matrices_alone(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_library(monkeypatch, "torch 1")
    matrices, entries = build(method="tsv"), build(method="ties")
    use_library(monkeypatch, "torch 2")
    changed = {shard for shard, key in build(method="tsv").items() if key != matrices[shard]}
    assert changed
    assert all("layers" in shard for shard in changed)
    assert build(method="ties") == entries


def test_a_third_party_method_on_whole_tensors_depends_on_the_math_library(
    build: Build,
    package: Callable[[dict[str, str]], type],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package({"__init__.py": "", "median.py": method_text(granularity="tensor")})
    use_library(monkeypatch, "torch 1")
    first = build(method="identity_median")
    use_library(monkeypatch, "torch 2")
    assert not merged(build(method="identity_median")) & merged(first)


def test_the_library_of_this_machine_is_described_with_version_and_instructions() -> None:
    import torch

    description = math_library.describe_math_library("cpu")
    assert f"torch {torch.__version__}" in description
    assert torch.backends.cpu.get_cpu_capability() in description
    assert "cuda" in math_library.describe_math_library("cuda").lower()


def test_a_worker_with_another_math_library_refuses(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver names the objects, so a worker that computes other bits must not fill them."""
    use_library(monkeypatch, "torch 1")
    monkeypatch.setattr(task_factory, "describe_math_library", lambda device: "torch 2")
    with pytest.raises(MmergeError, match="the run was started with torch 2"):
        build(method="tsv")


def test_a_worker_with_other_code_refuses(
    build: Build, package: Callable[[dict[str, str]], type], monkeypatch: pytest.MonkeyPatch
) -> None:
    package({"__init__.py": "", "median.py": method_text()})
    monkeypatch.setattr(task_factory, "digest_source", lambda method_class: "other")
    with pytest.raises(MmergeError, match="Install the same version of its package everywhere"):
        build(method="identity_median")
