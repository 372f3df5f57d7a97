"""Methods are found by name, ours and those of installed packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods import find_method, method_names, registry
from mmerge.workers.methods.interface import Block, MergedBlock
from mmerge.workers.methods.linear import Linear


@dataclass
class FakeDistribution:
    name: str
    version: str


def make_entry_point(name: str, target: str, package: str) -> EntryPoint:
    point = EntryPoint(name, target, registry.ENTRY_POINT_GROUP)
    vars(point)["dist"] = FakeDistribution(package, "1.0")
    return point


class Soup(Linear):
    """The linear merge by another name."""

    name = "soup"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points as if their packages were installed."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points)
    registry._find_origins.cache_clear()
    yield points
    registry._find_origins.cache_clear()


def test_every_name_is_that_of_the_method_it_finds() -> None:
    assert len(method_names()) == len(set(method_names())) >= 34
    for name in method_names():
        assert find_method(name).name == name


def test_names_are_listed_and_one_method_is_found_without_importing_the_others() -> None:
    code = """
import sys
from mmerge.workers.methods import find_method, method_names
method_names()
assert "torch" not in sys.modules
find_method("linear")
loaded = {name.rpartition(".")[2] for name in sys.modules if "workers.methods." in name}
assert loaded == {"registry", "interface", "linear"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names() -> None:
    with pytest.raises(RecipeError, match=r"no 'tiess'\. Did you mean 'ties'\? Choose one of mmer"):
        find_method("tiess")


def test_the_method_of_an_installed_package_is_found(
    install: list[EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("kitchen")
    vars(module)["Soup"] = Soup
    monkeypatch.setitem(sys.modules, "kitchen", module)
    install.append(make_entry_point("soup", "kitchen:Soup", "kitchen"))
    assert method_names()[-1] == "soup"
    assert isinstance(find_method("soup"), Linear)


def test_a_name_that_two_packages_define_is_refused_with_both_origins(
    install: list[EntryPoint],
) -> None:
    install.append(make_entry_point("ties", "kitchen.ties:Ties", "kitchen"))
    expected = r"by mmerge \(mmerge\.workers\.methods\.ties:Ties\) and kitchen 1\.0 \(kitchen\.ties"
    with pytest.raises(RecipeError, match=expected):
        find_method("ties")
    assert find_method("linear").name == "linear"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_package:Soup", r"kitchen 1\.0 \(no_such_package:Soup\) cannot be imported"),
        ("math:pi", "is no subclass of Method"),
        ("mmerge.workers.methods.linear:Linear", "a method that calls itself 'linear'"),
    ],
)
def test_an_entry_point_that_names_no_method_is_refused(
    target: str, message: str, install: list[EntryPoint]
) -> None:
    install.append(make_entry_point("soup", target, "kitchen"))
    with pytest.raises(RecipeError, match=message):
        find_method("soup")


def test_a_registered_method_may_not_take_the_name_of_another() -> None:
    with pytest.raises(RecipeError, match="'linear' is defined already"):
        registry.register_method(Linear())
    registry.register_method(Soup())
    try:
        assert find_method("soup").name == "soup"
    finally:
        registry.unregister_method("soup")


def test_a_method_that_overrides_its_arithmetic_does_not_run_the_inherited_pass() -> None:
    class Overridden(Linear):
        name = "overridden"

        def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
            return MergedBlock(block.base.to(block.dtype))

    assert Overridden.compiled_pass == ""
    assert Soup.compiled_pass == Linear.compiled_pass != ""
