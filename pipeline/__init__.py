"""Decisions: recipe → plan → run → manifest. The public Python names, imported when first used."""

from __future__ import annotations

if __name__ != "mmerge.pipeline":
    raise ImportError(
        f"import 'mmerge.pipeline', not {__name__!r}: a second copy has other classes"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmerge.manifests.errors import MmergeError
    from mmerge.manifests.format.manifest import Manifest
    from mmerge.manifests.maintenance.verify import VerifyReport, verify
    from mmerge.pipeline.build.run import RunReport, run
    from mmerge.pipeline.execution.open import open_executor
    from mmerge.pipeline.planning.plan import MergePlan, make_plan
    from mmerge.pipeline.recipes.parsing import parse_recipe, read_recipe
    from mmerge.pipeline.recipes.recipe import Recipe
    from mmerge.pipeline.recipes.schema import make_recipe_schema
    from mmerge.pipeline.serving.actors import ActorComposite, load_on_actors
    from mmerge.pipeline.views.build_summary import read_build
    from mmerge.workers.composite.loader import load_composite
    from mmerge.workers.composite.model import Composite
    from mmerge.workers.exports.checkpoint import export
    from mmerge.workers.modalities.prompt import Part

_MODULES = {
    "MmergeError": "mmerge.manifests.errors",
    "Manifest": "mmerge.manifests.format.manifest",
    "VerifyReport": "mmerge.manifests.maintenance.verify",
    "verify": "mmerge.manifests.maintenance.verify",
    "MergePlan": "mmerge.pipeline.planning.plan",
    "make_plan": "mmerge.pipeline.planning.plan",
    "Recipe": "mmerge.pipeline.recipes.recipe",
    "make_recipe_schema": "mmerge.pipeline.recipes.schema",
    "parse_recipe": "mmerge.pipeline.recipes.parsing",
    "read_recipe": "mmerge.pipeline.recipes.parsing",
    "RunReport": "mmerge.pipeline.build.run",
    "run": "mmerge.pipeline.build.run",
    "open_executor": "mmerge.pipeline.execution.open",
    "read_build": "mmerge.pipeline.views.build_summary",
    "Composite": "mmerge.workers.composite.model",
    "load_composite": "mmerge.workers.composite.loader",
    "Part": "mmerge.workers.modalities.prompt",
    "export": "mmerge.workers.exports.checkpoint",
    "ActorComposite": "mmerge.pipeline.serving.actors",
    "load_on_actors": "mmerge.pipeline.serving.actors",
}

__all__ = [
    "ActorComposite",
    "Composite",
    "Manifest",
    "MergePlan",
    "MmergeError",
    "Part",
    "Recipe",
    "RunReport",
    "VerifyReport",
    "export",
    "load_composite",
    "load_on_actors",
    "make_plan",
    "make_recipe_schema",
    "open_executor",
    "parse_recipe",
    "read_build",
    "read_recipe",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmerge.pipeline' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
