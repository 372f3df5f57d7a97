"""The merge methods: one file each, with its parameters, its arithmetic and its source."""

from __future__ import annotations

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.interface import Method
from mmerge.workers.methods.linear import Linear
from mmerge.workers.methods.mmer import Mmer
from mmerge.workers.methods.naive_mc import NaiveMc
from mmerge.workers.methods.task_arithmetic import TaskArithmetic
from mmerge.workers.methods.ties import Ties

METHODS: dict[str, Method] = {method.name: method for method in (Mmer(), NaiveMc(), TaskArithmetic(), Ties(), Linear())}
"""Every method by its name in a recipe."""


def find_method(name: str) -> Method:
    """Return the method of that name. Raises RecipeError with the names there are."""
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(f"method: there is no {name!r}; choose one of {', '.join(METHODS)}") from None
