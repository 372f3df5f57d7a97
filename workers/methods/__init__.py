"""The merge methods: one file each, with its parameters, its arithmetic and its source."""

from __future__ import annotations

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.adamms import Adamms
from mmerge.workers.methods.arcee_fusion import ArceeFusion
from mmerge.workers.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mmerge.workers.methods.damc import Damc
from mmerge.workers.methods.dare import DareLinear, DareTies
from mmerge.workers.methods.della import Della, DellaLinear
from mmerge.workers.methods.emr import Emr
from mmerge.workers.methods.interface import Method
from mmerge.workers.methods.iso_c import IsoC
from mmerge.workers.methods.karcher import Karcher
from mmerge.workers.methods.linear import Linear
from mmerge.workers.methods.mmer import Mmer
from mmerge.workers.methods.model_stock import ModelStock
from mmerge.workers.methods.multislerp import Multislerp
from mmerge.workers.methods.naive_mc import NaiveMc
from mmerge.workers.methods.nearswap import Nearswap
from mmerge.workers.methods.neuron_fusion import NeuronFusion
from mmerge.workers.methods.nuslerp import Nuslerp
from mmerge.workers.methods.pcb import Pcb
from mmerge.workers.methods.ram import Ram, RamPlus
from mmerge.workers.methods.sce import Sce
from mmerge.workers.methods.slerp import Slerp
from mmerge.workers.methods.swudi import Aswudi, Swudi
from mmerge.workers.methods.tall import Consensus, TallMasks
from mmerge.workers.methods.task_arithmetic import TaskArithmetic
from mmerge.workers.methods.ties import Ties
from mmerge.workers.methods.tsv import Tsv
from mmerge.workers.methods.wudi import Optmerge, Wudi

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
    Slerp(),
    Nuslerp(),
    Multislerp(),
    Karcher(),
    ModelStock(),
    Nearswap(),
    ArceeFusion(),
    Tsv(),
    IsoC(),
    Wudi(),
    Optmerge(),
    Swudi(),
    Aswudi(),
    Adamms(),
    NeuronFusion(),
    Damc(),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every method by its name in a recipe."""


def find_method(name: str) -> Method:
    """Return the method of that name. Raises RecipeError with the names there are."""
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(
            f"method: there is no {name!r}; choose one of {', '.join(METHODS)}"
        ) from None
