"""mergekit's methods and parameters, and what they are called in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmerge.workers.methods import method_names


@dataclass(frozen=True)
class Translation:
    """One of mergekit's methods as a method of recipes."""

    method: str
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe that mergekit's form of the method implies."""
    recipe_parameters: Mapping[str, str] = field(default_factory=dict)
    """mergekit's parameters of the whole merge, and their names in a recipe."""
    model_parameters: Mapping[str, str] = field(default_factory=dict)
    """mergekit's parameters of every model, and their names in a recipe."""
    required: tuple[str, ...] = ()
    """Parameters that mergekit demands."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """mergekit's defaults where they differ from a recipe's, by the names in a recipe."""
    special: tuple[str, ...] = ()
    """Parameters that change the method's form, see `MergekitTranslator.translate_special`."""

    @property
    def known_parameters(self) -> set[str]:
        """Every parameter that mergekit's YAML may set."""
        return {
            *self.recipe_parameters,
            *self.model_parameters,
            *self.special,
            *IGNORED_PARAMETERS,
        }


IGNORED_PARAMETERS = ("int8_mask",)
"""Settings of mergekit that change its memory, never the result."""
SWITCHES: Mapping[str, Mapping[bool, Any]] = {
    "reduction": {True: "mean", False: "sum"},
    "rescale": {True: "norm", False: "none"},
    "normalize": {True: True, False: False},
    "filter_wise": {True: True, False: False},
}
"""Values in a recipe of the parameters that are true or false in mergekit."""
BASE_AS_MODEL = ("slerp", "nearswap", "arcee_fusion")
"""Methods of two models, of which base_model is one."""
BASE_COUNTED = ("linear", "karcher")
"""Methods without a base, of which base_model is one more model."""
BASE_WITHOUT_EFFECT = ("passthrough",)
"""Methods that do not look at base_model."""

_WEIGHT = {"weight": "weight"}
_DENSITY = {"weight": "weight", "density": "density"}
_LINEAR = {"lambda": "scale", "normalize": "normalize"}
_TIES = {"lambda": "scale", "normalize": "reduction"}
_RESCALE = {"rescale": "rescale"}
_ELECT = {"zero_sign": "positive"}
TRANSLATIONS: dict[str, Translation] = {
    "linear": Translation(
        "linear",
        recipe_parameters={"normalize": "normalize"},
        model_parameters=_WEIGHT,
        required=("weight",),
    ),
    "passthrough": Translation(
        "linear",
        choices={"normalize": False},
        model_parameters={"scale": "weight"},
        defaults={"weight": 1.0},
    ),
    "task_arithmetic": Translation(
        "task_arithmetic",
        recipe_parameters=_LINEAR,
        model_parameters=_WEIGHT,
        required=("weight",),
    ),
    "ties": Translation(
        "ties",
        choices=_ELECT | {"scope": "tensor", "count": "exact"},
        recipe_parameters=_TIES,
        model_parameters=_DENSITY,
        required=("weight",),
        defaults={"reduction": True, "density": 1.0},
    ),
    "dare_linear": Translation(
        "dare_linear",
        recipe_parameters=_LINEAR | _RESCALE,
        model_parameters=_DENSITY,
        required=("weight",),
        defaults={"rescale": True, "density": 1.0},
    ),
    "dare_ties": Translation(
        "dare_ties",
        choices=_ELECT,
        recipe_parameters=_TIES | _RESCALE,
        model_parameters=_DENSITY,
        required=("weight",),
        defaults={"reduction": False, "rescale": True, "density": 1.0},
    ),
    "della_linear": Translation(
        "della_linear",
        recipe_parameters=_LINEAR | _RESCALE,
        model_parameters=_DENSITY | {"epsilon": "epsilon"},
        required=("weight",),
        defaults={"rescale": True, "density": 1.0},
    ),
    "della": Translation(
        "della",
        choices=_ELECT,
        recipe_parameters=_TIES | _RESCALE,
        model_parameters=_DENSITY | {"epsilon": "epsilon"},
        required=("weight",),
        defaults={"reduction": True, "rescale": True, "density": 1.0},
    ),
    "breadcrumbs": Translation(
        "breadcrumbs",
        recipe_parameters=_LINEAR,
        model_parameters=_DENSITY | {"gamma": "gamma"},
        required=("weight",),
        defaults={"density": 1.0},
    ),
    "breadcrumbs_ties": Translation(
        "breadcrumbs_ties",
        choices=_ELECT,
        recipe_parameters=_TIES,
        model_parameters=_DENSITY | {"gamma": "gamma"},
        required=("weight",),
        defaults={"reduction": False, "density": 1.0},
    ),
    "sce": Translation("sce", recipe_parameters={"select_topk": "select_topk"}),
    "ram": Translation("ram", recipe_parameters={"epsilon": "epsilon"}),
    "ramplus_tl": Translation(
        "ram_plus", recipe_parameters={"epsilon": "epsilon", "r": "r", "alpha": "alpha"}
    ),
    "slerp": Translation("slerp", recipe_parameters={"t": "t"}, required=("t",)),
    "nuslerp": Translation(
        "nuslerp",
        model_parameters=_WEIGHT,
        required=("weight",),
        special=("nuslerp_flatten", "nuslerp_row_wise"),
    ),
    "multislerp": Translation(
        "multislerp",
        recipe_parameters={"normalize_weights": "normalize"},
        model_parameters=_WEIGHT,
        required=("weight",),
        special=("eps",),
    ),
    "karcher": Translation("karcher", recipe_parameters={"max_iter": "max_iter", "tol": "tol"}),
    "model_stock": Translation("model_stock", recipe_parameters={"filter_wise": "filter_wise"}),
    "nearswap": Translation("nearswap", recipe_parameters={"t": "t"}, required=("t",)),
    "arcee_fusion": Translation("arcee_fusion"),
}

ALTERNATIVES = {
    "ties_svd": "ties",
    "core_space": "tsv",
    "cabs": "breadcrumbs",
    "generalized_task_arithmetic": "task_arithmetic",
    "dare": "dare_linear",
    "breadcrumbs_linear": "breadcrumbs",
    "consensus_ta": "task_arithmetic",
    "consensus_ties": "ties",
    "ramplus": "ramplus_tl",
}
"""Methods of mergekit and of its forks without a counterpart, and what is nearest to them."""


def list_translated_methods() -> list[str]:
    """Return the names of mergekit's methods that have a counterpart here."""
    installed_methods = method_names()
    return [name for name, item in TRANSLATIONS.items() if item.method in installed_methods]
