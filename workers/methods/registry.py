"""The registry of methods: names, where each is defined, and how third parties add theirs.

A method is found by its name in a recipe. Nothing is imported before it is used: the registry
holds strings `module:attribute`. An installed package adds a method by an entry point:

    [project.entry-points."mmerge.methods"]
    trimmed_mean = "my_package.trimmed_mean:TrimmedMean"

docs/add-a-method.md shows a whole package.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mmerge.manifests.errors import RecipeError

if TYPE_CHECKING:
    from mmerge.workers.methods.interface import Method

ENTRY_POINT_GROUP = "mmerge.methods"
_PACKAGE = "mmerge.workers.methods"
_DEFINITIONS: Mapping[str, str] = {
    "mmer": "mmer:Mmer",
    "tall_masks": "tall:TallMasks",
    "emr": "emr:Emr",
    "naive_mc": "naive_mc:NaiveMc",
    "linear": "linear:Linear",
    "task_arithmetic": "task_arithmetic:TaskArithmetic",
    "ties": "ties:Ties",
    "dare_linear": "dare:DareLinear",
    "dare_ties": "dare:DareTies",
    "della": "della:Della",
    "della_linear": "della:DellaLinear",
    "breadcrumbs": "breadcrumbs:Breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs:BreadcrumbsTies",
    "sce": "sce:Sce",
    "pcb": "pcb:Pcb",
    "consensus": "tall:Consensus",
    "ram": "ram:Ram",
    "ram_plus": "ram:RamPlus",
    "slerp": "slerp:Slerp",
    "nuslerp": "nuslerp:Nuslerp",
    "multislerp": "multislerp:Multislerp",
    "karcher": "karcher:Karcher",
    "model_stock": "model_stock:ModelStock",
    "nearswap": "nearswap:Nearswap",
    "arcee_fusion": "arcee_fusion:ArceeFusion",
    "tsv": "tsv:Tsv",
    "iso_c": "iso_c:IsoC",
    "wudi": "wudi:Wudi",
    "optmerge": "wudi:Optmerge",
    "swudi": "swudi:Swudi",
    "aswudi": "swudi:Aswudi",
    "adamms": "adamms:Adamms",
    "neuron_fusion": "neuron_fusion:NeuronFusion",
    "damc": "damc:Damc",
}
"""Our methods in the order in which they are listed: `module:attribute` below `_PACKAGE`."""


@dataclass(frozen=True)
class MethodOrigin:
    """Where a method is defined."""

    target: str
    """`module:attribute` of a subclass of `Method`."""
    package: str
    """The distribution that provides it, with its version; `mmerge` for ours."""

    def __str__(self) -> str:
        return f"{self.package} ({self.target})"


@cache
def _find_origins() -> Mapping[str, tuple[MethodOrigin, ...]]:
    """Return all origins by method name: ours first, then the entry points of installed packages.

    Cached, since listing the entry points reads the metadata of every installed package.
    """
    origins = {
        name: (MethodOrigin(f"{_PACKAGE}.{target}", "mmerge"),)
        for name, target in _DEFINITIONS.items()
    }
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    for point in points:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
        origin = MethodOrigin(point.value, package)
        if origin not in origins.get(point.name, ()):
            origins[point.name] = (*origins.get(point.name, ()), origin)
    return origins


_registered: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Add a method to this process alone, for experiments and tests.

    Worker processes do not see it; use an entry point for a method that is to be used by others.

    Raises:
        RecipeError: there is a method of that name already.
    """
    if method.name in method_names():
        raise RecipeError(f"method: {method.name!r} is defined already. Choose another name")
    _registered[method.name] = method


def unregister_method(name: str) -> None:
    """Remove a method that `register_method` added."""
    del _registered[name]


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, ours first, without importing any of them."""
    return (*_find_origins(), *_registered)


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        RecipeError: there is none, with the names there are; two packages define it, with both
            origins; or what the entry point names is no method.
    """
    if name in _registered:
        return _registered[name]
    origins = _find_origins().get(name, ())
    if not origins:
        raise RecipeError(_describe_unknown(name))
    if len(origins) > 1:
        listed = " and ".join(str(origin) for origin in origins)
        raise RecipeError(
            f"method: {name!r} is defined more than once, by {listed}. Uninstall one of the"
            " packages, or rename its entry point"
        )
    return _load_method(name, origins[0])


@cache
def _load_method(name: str, origin: MethodOrigin) -> Method:
    """Import a method and return its only instance (methods have no state)."""
    from mmerge.workers.methods.interface import Method  # imports torch

    module_name, _, attribute = origin.target.partition(":")
    try:
        method_class = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"method: {name!r} of {origin} cannot be imported: {error}. Repair or uninstall the"
            " package"
        ) from error
    if not (isinstance(method_class, type) and issubclass(method_class, Method)):
        raise RecipeError(f"method: {name!r} of {origin} is no subclass of Method")
    method = method_class()
    if method.name != name:
        raise RecipeError(
            f"method: the entry point {name!r} of {origin} names a method that calls itself"
            f" {method.name!r}. Give both the same name"
        )
    return method


def _describe_unknown(name: str) -> str:
    names = method_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"method: there is no {name!r}.{hint} Choose one of {', '.join(names)}"
