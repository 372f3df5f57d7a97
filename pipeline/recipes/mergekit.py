"""mergekit's YAML read as a recipe: the same methods under their names there, and clear words about
what there is none for.

The arithmetic follows mergekit's documentation: trimming per tensor with an exact count, a zero sum
counted as positive, DARE and DELLA rescaled by norms. Always in float32, rounded once to
`out_dtype` or `dtype`; random numbers are this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from mmerge.manifests.errors import RecipeError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.methods import find_method, method_names

KNOWN_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template",
    "name",
)  # fmt: skip
IGNORED_PARAMETERS = ("int8_mask",)
"""Settings of mergekit that change memory alone, never the result."""


@dataclass(frozen=True)
class Translation:
    """How one of mergekit's methods is said in a recipe."""

    method: str
    choices: Mapping[str, Any]
    """Keys of the recipe that mergekit's form of the method always has."""
    globals: Mapping[str, str]
    """mergekit's parameters of the whole merge, and their names here."""
    per_model: Mapping[str, str]
    """mergekit's parameters per model, and their names here."""
    required: tuple[str, ...] = ()
    """Parameters that mergekit demands."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """mergekit's defaults where they are not ours, of recipe and experts, by the names here."""


_WEIGHT = {"weight": "weight"}
_DENSITY = {"weight": "weight", "density": "density"}
_SCALE = {"lambda": "scale"}
_ELECT = {"zero_sign": "positive"}
TRANSLATIONS: dict[str, Translation] = {
    "linear": Translation("linear", {}, {"normalize": "normalize"}, _WEIGHT, ("weight",)),
    "task_arithmetic": Translation("task_arithmetic", {}, _SCALE | {"normalize": "normalize"}, _WEIGHT, ("weight",)),
    "ties": Translation(
        "ties", _ELECT | {"scope": "tensor", "count": "exact"}, _SCALE | {"normalize": "reduction"}, _DENSITY, ("weight",),
        {"reduction": True, "density": 1.0},
    ),
    "dare_linear": Translation(
        "dare_linear", {}, _SCALE | {"normalize": "normalize", "rescale": "rescale"}, _DENSITY, ("weight",), {"rescale": True, "density": 1.0}
    ),
    "dare_ties": Translation(
        "dare_ties", _ELECT, _SCALE | {"normalize": "reduction", "rescale": "rescale"}, _DENSITY, ("weight",),
        {"reduction": False, "rescale": True, "density": 1.0},
    ),
    "della_linear": Translation(
        "della_linear", {}, _SCALE | {"normalize": "normalize", "rescale": "rescale"}, _DENSITY | {"epsilon": "epsilon"}, ("weight",),
        {"rescale": True, "density": 1.0},
    ),
    "della": Translation(
        "della", _ELECT, _SCALE | {"normalize": "reduction", "rescale": "rescale"}, _DENSITY | {"epsilon": "epsilon"}, ("weight",),
        {"reduction": True, "rescale": True, "density": 1.0},
    ),
    "breadcrumbs": Translation(
        "breadcrumbs", {}, _SCALE | {"normalize": "normalize"}, _DENSITY | {"gamma": "gamma"}, ("weight",), {"density": 1.0}
    ),
    "breadcrumbs_ties": Translation(
        "breadcrumbs_ties", _ELECT, _SCALE | {"normalize": "reduction"}, _DENSITY | {"gamma": "gamma"}, ("weight",),
        {"reduction": False, "density": 1.0},
    ),
    "sce": Translation("sce", {}, {"select_topk": "select_topk"}, {}),
    "ram": Translation("ram", {}, {"epsilon": "epsilon"}, {}),
    "ramplus_tl": Translation("ram_plus", {}, {"epsilon": "epsilon", "r": "r", "alpha": "alpha"}, {}),
    "slerp": Translation("slerp", {}, {"t": "t"}, {}, ("t",)),
    "nuslerp": Translation("nuslerp", {}, {}, _WEIGHT, ("weight",)),
    "multislerp": Translation("multislerp", {}, {"normalize_weights": "normalize"}, _WEIGHT, ("weight",)),
    "karcher": Translation("karcher", {}, {"max_iter": "max_iter", "tol": "tol"}, {}),
    "model_stock": Translation("model_stock", {}, {"filter_wise": "filter_wise"}, {}),
    "nearswap": Translation("nearswap", {}, {"t": "t"}, {}, ("t",)),
    "arcee_fusion": Translation("arcee_fusion", {}, {}, {}),
}  # fmt: skip
_SWITCHES: Mapping[str, Mapping[bool, Any]] = {
    "reduction": {True: "mean", False: "sum"},
    "rescale": {True: "norm", False: "none"},
    "normalize": {True: True, False: False},
    "filter_wise": {True: True, False: False},
}


def is_mergekit(raw: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a parsed YAML is one of mergekit's."""
    return isinstance(raw, dict) and "merge_method" in raw


def from_mergekit(raw: Mapping[str, Any], *, folder: Path, default_name: str) -> dict[str, Any]:
    """Return the recipe that a mergekit YAML stands for, as a mapping.

    The composite goes to the folder NAME-composite beside the YAML, which names no output.

    Raises:
        RecipeError: it asks for something that there is none for; the message begins with the key.
    """
    return _Reader(raw, folder).read(default_name)


@dataclass(frozen=True)
class _Slice:
    """A stretch of layers with its parameters: of the slice, and of each model."""

    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]


class _Reader:
    def __init__(self, raw: Mapping[str, Any], folder: Path) -> None:
        self.raw, self.folder = raw, folder
        self.method = str(raw["merge_method"])
        if (
            self.method not in TRANSLATIONS
            or TRANSLATIONS[self.method].method not in method_names()
        ):
            known = ", ".join(
                name for name, found in TRANSLATIONS.items() if found.method in method_names()
            )
            raise RecipeError(
                f"merge_method: {self.method!r} has no counterpart here; of mergekit's there are"
                f" {known}"
            )
        self.translation = TRANSLATIONS[self.method]
        self.base = (
            self._to_model(raw["base_model"], "base_model")
            if raw.get("base_model") is not None
            else None
        )

    def read(self, default_name: str) -> dict[str, Any]:
        self._check_keys()
        slices = self._read_slices()
        self._check_parameters(slices)
        models = self._choose_experts(list(slices[0].models))
        names = _make_names(models)
        keeps_base = self.base is not None and (
            find_method(self.translation.method).needs_base or self.base not in models
        )
        recipe: dict[str, Any] = {
            "method": self.translation.method,
            "output": f"{default_name}-composite",
            **self.translation.choices,
        }
        if keeps_base and self.method not in ("linear", "karcher"):  # these two do not look at it
            recipe["base"] = self.base
        dtype = self.raw.get("out_dtype") or self.raw.get("dtype")
        if dtype is not None:
            recipe["dtype"] = dtype
        for theirs, ours in self.translation.globals.items():
            recipe |= self._translate(theirs, ours, slices, model=None)
        recipe |= self._special(slices)
        recipe["experts"] = {
            names[model]: (
                {"path": _to_path(model, self.folder), "modality": "text"}
                | self._translate_model(model, slices)
            )
            for model in models
        }
        if "base" in recipe:
            recipe["base"] = _to_path(recipe["base"], self.folder)
        return recipe

    @cached_property
    def num_layers(self) -> int:
        """Layers of the models, from the configuration of one of them."""
        entries = self.raw.get("models") or self.raw["slices"][0]["sources"]
        model = self.base or self._to_model(entries[0].get("model"), "models.0.model")
        return int(
            Checkpoint(_to_path(model, self.folder), owner=f"model {model!r}").text_config.get(
                "num_hidden_layers", 0
            )
        )

    def _check_keys(self) -> None:
        for key in self.raw:
            if key not in KNOWN_KEYS:
                self._refuse(str(key), "is not supported")
        source = self.raw.get("tokenizer_source", "base")
        tokenizer = self.raw.get("tokenizer") or {"source": "base"}
        if (
            source not in ("base", None)
            or not isinstance(tokenizer, dict)
            or tokenizer != {"source": "base"}
        ):
            self._refuse(
                "tokenizer_source" if source not in ("base", None) else "tokenizer",
                "only the base's tokenizer is kept: use 'base'",
            )
        if self.raw.get("chat_template") not in (None, "auto"):
            self._refuse("chat_template", "is not supported: the base's is kept")
        if ("models" in self.raw) == ("slices" in self.raw):
            self._refuse("models", "give either 'models' or 'slices'")

    def _read_slices(self) -> list[_Slice]:
        if "models" in self.raw:
            models = {}
            for index, entry in enumerate(self._list(self.raw["models"], "models")):
                where = f"models.{index}"
                self._only(entry, ("model", "parameters"), where)
                models[self._to_model(entry.get("model"), f"{where}.model")] = _mapping(
                    entry.get("parameters"), f"{where}.parameters"
                )
            return [_Slice(None, {}, models)]
        slices = [
            self._read_slice(entry, f"slices.{index}")
            for index, entry in enumerate(self._list(self.raw["slices"], "slices"))
        ]
        return self._stretch(slices)

    def _read_slice(self, entry: Any, where: str) -> _Slice:
        self._only(entry, ("sources", "parameters"), where)
        ranges, models = set(), {}
        for index, source in enumerate(self._list(entry.get("sources"), f"{where}.sources")):
            place = f"{where}.sources.{index}"
            self._only(source, ("model", "layer_range", "parameters"), place)
            layers = source.get("layer_range")
            if not (
                isinstance(layers, list)
                and len(layers) == 2
                and all(isinstance(layer, int) for layer in layers)
            ):
                raise RecipeError(
                    f"{place}.layer_range: expected [first, last + 1], got {layers!r}"
                )
            ranges.add((layers[0], layers[1]))
            models[self._to_model(source.get("model"), f"{place}.model")] = _mapping(
                source.get("parameters"), f"{place}.parameters"
            )
        if len(ranges) != 1:
            shown = ", ".join(str(list(found)) for found in sorted(ranges))
            raise RecipeError(
                f"{where}: its sources have different layer ranges ({shown}); only equal ones can"
                " be merged here"
            )
        return _Slice(
            ranges.pop(), _mapping(entry.get("parameters"), f"{where}.parameters"), models
        )

    def _stretch(self, slices: list[_Slice]) -> list[_Slice]:
        """Return the slices with inclusive layers; embeddings belong to the first, the last norm
        and the head to the last.
        """
        num_layers, expected = self.num_layers, 0
        stretched = []
        for index, part in enumerate(slices):
            assert part.layers is not None
            first, stop = part.layers
            if set(part.models) != set(slices[0].models):
                raise RecipeError(
                    f"slices.{index}: has other models than slices.0; every slice must merge the"
                    " same ones here"
                )
            if first != expected or stop <= first:
                raise RecipeError(
                    f"slices.{index}: begins at layer {first}, expected {expected}: slices that"
                    " skip, repeat or reorder layers are not supported"
                )
            expected = stop
            last = index == len(slices) - 1
            stretched.append(
                _Slice(
                    (first if index else -1, num_layers if last else stop - 1),
                    part.parameters,
                    part.models,
                )
            )
        if expected != num_layers:
            raise RecipeError(
                f"slices: end at layer {expected}, the model has {num_layers}; leaving layers out"
                " is not supported"
            )
        return stretched

    def _choose_experts(self, models: list[str]) -> list[str]:
        if self.method == "linear":
            return models
        experts = [model for model in models if model != self.base]
        if self.method == "karcher":
            experts = models
        if self.method in ("slerp", "nearswap", "arcee_fusion"):
            if self.base is None:
                raise RecipeError(
                    f"base_model: is missing; {self.method} needs it as one of its two models"
                )
            if len(experts) != 1:
                raise RecipeError(
                    f"models: {self.method} takes one model beside base_model, got {len(experts)}"
                )
        if not experts:
            raise RecipeError("models: none is left beside base_model")
        return experts

    def _check_parameters(self, slices: Sequence[_Slice]) -> None:
        """Refuse what the method does not know, at every level; mergekit reads all of them at any
        level.
        """
        known = {
            *self.translation.globals,
            *self.translation.per_model,
            *IGNORED_PARAMETERS,
            *_SPECIAL.get(self.method, ()),
        }
        levels = [("parameters", _mapping(self.raw.get("parameters"), "parameters"))]
        for part in slices:
            levels += [
                ("slices.parameters", part.parameters),
                *((f"{model}.parameters", found) for model, found in part.models.items()),
            ]
        for where, level in levels:
            for key in level:
                if key not in known:
                    hint = (
                        " (TIES here does not rescale)"
                        if (self.method, key) == ("ties", "rescale")
                        else ""
                    )
                    raise RecipeError(
                        f"{where}.{key}: mergekit's {self.method} has no such parameter here{hint};"
                        f" known are {', '.join(sorted(known))}"
                    )

    def _translate_model(self, model: str, slices: Sequence[_Slice]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for theirs, ours in self.translation.per_model.items():
            found |= self._translate(theirs, ours, slices, model=model)
        return found

    def _translate(
        self, theirs: str, ours: str, slices: Sequence[_Slice], *, model: str | None
    ) -> dict[str, Any]:
        """Return {our key: its value or schedule}; empty where mergekit's default is ours."""
        shared = _mapping(self.raw.get("parameters"), "parameters").get(theirs)
        rules: list[dict[str, Any]] = []
        given = False
        for part in slices:
            own = part.models[model].get(theirs) if model is not None else None
            levels = [
                level for level in (own, part.parameters.get(theirs), shared) if level is not None
            ]
            given = given or bool(levels)
            rules += self._to_rules(levels, part.layers, where=theirs)
        if not given:
            if theirs in self.translation.required:
                raise RecipeError(
                    f"{f'{model}.' if model else ''}parameters.{theirs}: is missing; mergekit's"
                    f" {self.method} demands it"
                )
            defaults = self.translation.defaults
            return (
                {ours: _SWITCHES[ours][defaults[ours]] if ours in _SWITCHES else defaults[ours]}
                if ours in defaults
                else {}
            )
        if ours in _SWITCHES:
            if len(rules) != 1 or not isinstance(rules[0]["value"], bool):
                raise RecipeError(
                    f"parameters.{theirs}: must be true or false for all tensors here"
                )
            return {ours: _SWITCHES[ours][rules[0]["value"]]}
        if ours in self.translation.defaults and (len(rules) > 1 or len(rules[0]) > 1):
            rules.append({"value": self.translation.defaults[ours]})
        rules = _cut(rules)
        single = rules[0]["value"] if len(rules) == 1 and len(rules[0]) == 1 else None
        return {ours: rules if single is None else single}

    def _to_rules(
        self, levels: Sequence[Any], layers: tuple[int, int] | None, *, where: str
    ) -> list[dict[str, Any]]:
        """Return our rules for mergekit's settings of one parameter, the innermost level first."""
        rules: list[dict[str, Any]] = []
        for level in levels:
            conditions = (
                level
                if isinstance(level, list) and any(isinstance(item, dict) for item in level)
                else [{"value": level}]
            )
            for condition in conditions:
                if (
                    not isinstance(condition, dict)
                    or "value" not in condition
                    or set(condition) - {"value", "filter"}
                ):
                    raise RecipeError(
                        f"parameters.{where}: expected {{filter, value}}, got {condition!r}"
                    )
                chosen, value = condition.get("filter"), condition["value"]
                pattern = (
                    {}
                    if chosen in (None, "*")
                    else {"pattern": "*" + str(chosen).replace("[", "[[]") + "*"}
                )
                if (
                    isinstance(value, list)
                    and value
                    and (layers is None or layers[1] >= self.num_layers)
                ):
                    # mergekit gives the last norm and the head the beginning of a gradient; here
                    # they would have its end.
                    rules.append(
                        {"value": value[0], "layers": [self.num_layers, self.num_layers]} | pattern
                    )
                rules.append(
                    {"value": value}
                    | ({} if layers is None else {"layers": list(layers)})
                    | pattern
                )
        return rules

    def _special(self, slices: Sequence[_Slice]) -> dict[str, Any]:
        """Return the keys of methods whose settings are said in another way here."""
        given = _mapping(self.raw.get("parameters"), "parameters")
        if self.method == "nuslerp":
            flatten, by_row = (
                bool(given.get("nuslerp_flatten", True)),
                bool(given.get("nuslerp_row_wise", False)),
            )
            along = "tensor" if flatten else "rows" if by_row else "columns"
            return {"along": along, "origin": "zero" if self.base is None else "base"}
        if self.method == "multislerp":
            if float(given.get("eps", 1e-8)) != 1e-8:
                self._refuse("parameters.eps", "is not supported")
            return {"origin": "zero" if self.base is None else "base"}
        return {}

    def _to_model(self, value: Any, where: str) -> str:
        """Return the path or name of a model. Raises RecipeError for LoRA and revisions in it."""
        if (
            isinstance(value, dict)
            and isinstance(value.get("model"), dict)
            and not value.get("lora")
        ):
            value = value["model"].get("path") if not value["model"].get("revision") else value
        if not isinstance(value, str) or not value:
            raise RecipeError(
                f"{where}: expected the path of a model, got {value!r}; LoRA adapters and revisions"
                " are not supported there"
            )
        if "+" in value and not (self.folder / value).exists():
            raise RecipeError(
                f"{where}: {value!r}: LoRA adapters (model+adapter) are not supported in a mergekit"
                " YAML; write a recipe of this project"
            )
        return value

    def _only(self, entry: Any, keys: Sequence[str], where: str) -> None:
        if not isinstance(entry, dict):
            raise RecipeError(f"{where}: expected a mapping with {', '.join(keys)}, got {entry!r}")
        for key in entry:
            if key not in keys:
                self._refuse(f"{where}.{key}", "is not supported")

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        return value

    def _refuse(self, key: str, reason: str) -> NoReturn:
        raise RecipeError(
            f"{key}: {reason}. Of mergekit's YAML there are models or slices of equal layer ranges,"
            " parameters, dtype, tokenizer_source: base"
        )


_SPECIAL = {"nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"), "multislerp": ("eps",)}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a mapping, got {value!r}")
    return value


def _cut(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules without those that can never hold: after one for every tensor of the same
    layers.
    """
    kept: list[dict[str, Any]] = []
    closed: list[Any] = []
    for rule in rules:
        if rule.get("layers") in closed or None in closed:
            continue
        kept.append(rule)
        if "pattern" not in rule:
            closed.append(rule.get("layers"))
    return kept


def _make_names(models: Sequence[str]) -> dict[str, str]:
    """Return a name for every model: the last part of its path, made unique."""
    names: dict[str, str] = {}
    for model in models:
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", model.rstrip("/").rpartition("/")[2])[:36] or "model"
        stem = stem if stem[0].isalpha() else f"m-{stem}"
        taken = set(names.values())
        names[model] = next(
            name
            for index in range(len(models) + 1)
            if (name := stem if not index else f"{stem}-{index}") not in taken
        )
    return names


def _to_path(model: str, folder: Path) -> str:
    """Return where a model is: as the YAML says, or below the working folder, to which mergekit's
    paths are relative.
    """
    if "://" in model or Path(model).is_absolute():
        return model
    if (folder / model).exists():
        return str((folder / model).absolute())
    return str(Path(model).absolute()) if Path(model).exists() else model
