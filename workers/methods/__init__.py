"""The merge methods: one file each, with its parameters, its arithmetic and its source."""

from __future__ import annotations

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mmerge.workers.methods.dare import DareLinear, DareTies
from mmerge.workers.methods.della import Della, DellaLinear
from mmerge.workers.methods.emr import Emr
from mmerge.workers.methods.interface import Method
from mmerge.workers.methods.linear import Linear
from mmerge.workers.methods.mmer import Mmer
from mmerge.workers.methods.naive_mc import NaiveMc
from mmerge.workers.methods.pcb import Pcb
from mmerge.workers.methods.ram import Ram, RamPlus
from mmerge.workers.methods.sce import Sce
from mmerge.workers.methods.tall import Consensus, TallMasks
from mmerge.workers.methods.task_arithmetic import TaskArithmetic
from mmerge.workers.methods.ties import Ties

_ALL: tuple[Method, ...] = (
    Mmer(),
    TallMasks(),
    Emr(),
    NaiveMc(),
    Linear(),
    TaskArithmetic(),
    Ties(),
    DareLinear(),
    DareTies(),
    Della(),
    DellaLinear(),
    Breadcrumbs(),
    BreadcrumbsTies(),
    Sce(),
    Pcb(),
    Consensus(),
    Ram(),
    RamPlus(),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every method by its name in a recipe."""


def find_method(name: str) -> Method:
    """Return the method of that name. Raises RecipeError with the names there are."""
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(f"method: there is no {name!r}; choose one of {', '.join(METHODS)}") from None
