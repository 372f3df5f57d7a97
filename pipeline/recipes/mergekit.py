"""mergekit's YAML as a recipe: the same methods under the names they have here.

The arithmetic follows mergekit's documentation: trimming per tensor with an exact count, a zero sum
counted as positive, DARE and DELLA rescaled by norms. It runs in float32 and rounds once to
`out_dtype` or `dtype`; random numbers are this project's own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.mergekit_document import MergekitDocument, Slice, refuse
from mmerge.pipeline.recipes.mergekit_methods import (
    BASE_AS_MODEL,
    BASE_IGNORED,
    SWITCHES,
    TRANSLATIONS,
    list_translated_methods,
)
from mmerge.workers.methods import find_method

Rules = list[dict[str, Any]]
log = logging.getLogger("mmerge.recipe")
IGNORED_ELSEWHERE = {
    "dtype",
    *(key for translation in TRANSLATIONS.values() for key in translation.known_parameters),
}
"""Parameters that mergekit ignores where a method has none of that name. Others are misspelt."""


def is_mergekit(raw: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a parsed YAML is one of mergekit's."""
    return isinstance(raw, dict) and ("merge_method" in raw or "gate_mode" in raw)


def from_mergekit(raw: Mapping[str, Any], *, folder: Path, default_name: str) -> dict[str, Any]:
    """Return the recipe that a mergekit YAML stands for, as a mapping.

    mergekit's YAML has no output: the store is the folder NAME-composite beside the YAML.

    Raises:
        RecipeError: it asks for something that is not supported; the message begins with the key.
    """
    return MergekitTranslator(MergekitDocument(raw, folder)).translate(default_name)


class MergekitTranslator:
    """Translates one mergekit YAML."""

    def __init__(self, document: MergekitDocument) -> None:
        document.check_keys()
        self.document = document
        self.method = document.method
        translated_methods = list_translated_methods()
        if self.method not in translated_methods:
            raise RecipeError(
                f"merge_method: {self.method!r} has no counterpart here. Supported are"
                f" {', '.join(translated_methods)}"
            )
        self.translation = TRANSLATIONS[self.method]

    def translate(self, default_name: str) -> dict[str, Any]:
        """Return the recipe as a mapping. Raises RecipeError."""
        document, translation = self.document, self.translation
        slices = document.read_slices()
        self._check_parameters(slices)
        models = self._choose_experts(list(slices[0].models))
        recipe: dict[str, Any] = {
            "method": translation.method,
            "output": f"{default_name}-composite",
            **translation.choices,
        }
        dtype = document.raw.get("out_dtype") or document.raw.get("dtype")
        if dtype is not None:
            recipe["dtype"] = dtype
        for mergekit_name, name in translation.recipe_parameters.items():
            recipe |= self._translate_parameter(mergekit_name, name, slices, model=None)
        recipe |= self.translate_special()
        names = _make_names(models)
        recipe["experts"] = {names[model]: self._make_expert(model, slices) for model in models}
        if self._keeps_base(models):
            assert document.base is not None
            recipe["base"] = document.to_path(document.base)
        return recipe

    def _keeps_base(self, models: Sequence[str]) -> bool:
        base = self.document.base
        if base is None or self.method in BASE_IGNORED:
            return False
        return find_method(self.translation.method).needs_base or base not in models

    def _choose_experts(self, models: list[str]) -> list[str]:
        if self.method in BASE_IGNORED:
            return models
        experts = [model for model in models if model != self.document.base]
        if self.method in BASE_AS_MODEL:
            if self.document.base is None:
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

    def _check_parameters(self, slices: Sequence[Slice]) -> None:
        """Refuse parameters that the method does not have; mergekit reads all at every level."""
        known_parameters = self.translation.known_parameters
        levels = [("parameters", self.document.parameters)]
        for part in slices:
            levels.append(("slices.parameters", part.parameters))
            for model, parameters in part.models.items():
                levels.append((f"{model}.parameters", parameters))
        for where, level in levels:
            for key in level:
                if key in self.translation.special and where != "parameters":
                    raise RecipeError(
                        f"{where}.{key}: is one setting for the whole merge here. Write it under"
                        " 'parameters'"
                    )
                if key in known_parameters:
                    continue
                if key in IGNORED_ELSEWHERE and (self.method, key) != ("ties", "rescale"):
                    log.warning("%s.%s: has no effect with %s", where, key, self.method)
                    continue
                is_rescaled_ties = (self.method, key) == ("ties", "rescale")
                hint = " (TIES here does not rescale)" if is_rescaled_ties else ""
                raise RecipeError(
                    f"{where}.{key}: mergekit's {self.method} has no such parameter here{hint}."
                    f" Known are {', '.join(sorted(known_parameters))}"
                )

    def _make_expert(self, model: str, slices: Sequence[Slice]) -> dict[str, Any]:
        expert: dict[str, Any] = {"path": self.document.to_path(model), "modality": "text"}
        for mergekit_name, name in self.translation.model_parameters.items():
            expert |= self._translate_parameter(mergekit_name, name, slices, model=model)
        return expert

    def _translate_parameter(
        self, mergekit_name: str, name: str, slices: Sequence[Slice], *, model: str | None
    ) -> dict[str, Any]:
        """Return {name: value or schedule}; empty where mergekit's default is a recipe's."""
        defaults = self.translation.defaults
        rules: Rules = []
        for part in slices:
            # The innermost level decides.
            levels = [part.parameters.get(mergekit_name)]
            levels.append(self.document.parameters.get(mergekit_name))
            if model is not None:
                levels.insert(0, part.models[model].get(mergekit_name))
            for level in levels:
                if level is not None:
                    rules += self._to_rules(level, part.layers, where=mergekit_name)
        if not rules:
            if mergekit_name in self.translation.required:
                owner = f"{model}." if model else ""
                raise RecipeError(
                    f"{owner}parameters.{mergekit_name}: is missing; mergekit's {self.method}"
                    " demands it"
                )
            if name not in defaults:
                return {}
            default = defaults[name]
            return {name: SWITCHES[name][default] if name in SWITCHES else default}
        if name in SWITCHES:
            if len(rules) != 1 or not isinstance(rules[0]["value"], bool):
                raise RecipeError(
                    f"parameters.{mergekit_name}: must be true or false for all tensors here"
                )
            return {name: SWITCHES[name][rules[0]["value"]]}
        if name in defaults and (len(rules) > 1 or len(rules[0]) > 1):
            rules.append({"value": defaults[name]})
        rules = _drop_unreachable(rules)
        if len(rules) == 1 and len(rules[0]) == 1 and rules[0]["value"] is not None:
            return {name: rules[0]["value"]}
        return {name: rules}

    def _to_rules(self, level: Any, layers: tuple[int, int] | None, *, where: str) -> Rules:
        """Return the rules for mergekit's setting of one parameter at one level."""
        has_conditions = isinstance(level, list) and any(isinstance(item, dict) for item in level)
        rules: Rules = []
        for condition in level if has_conditions else [{"value": level}]:
            _check_condition(condition, where)
            value, name_filter = condition["value"], condition.get("filter")
            scope: dict[str, Any] = {} if layers is None else {"layers": list(layers)}
            pattern = {}
            if name_filter not in (None, "*"):
                pattern["pattern"] = "*" + str(name_filter).replace("[", "[[]") + "*"
            is_gradient = isinstance(value, list) and bool(value)
            # mergekit gives the last norm and the head the beginning of a gradient; a schedule
            # would give them its end.
            if is_gradient:
                after_layers = self.document.num_layers
                if layers is None or layers[1] >= after_layers:
                    scope_after = {"layers": [after_layers, after_layers]}
                    rules.append({"value": value[0]} | scope_after | pattern)
            rules.append({"value": value} | scope | pattern)
        return rules

    def translate_special(self) -> dict[str, Any]:
        """Return the keys of methods whose form depends on mergekit's parameters."""
        origin = "zero" if self.document.base is None else "base"
        if self.method == "nuslerp":
            along = "columns"
            if self._read_switch("nuslerp_flatten", default=True):
                along = "tensor"
            elif self._read_switch("nuslerp_row_wise", default=False):
                along = "rows"
            return {"along": along, "origin": origin}
        if self.method == "multislerp":
            if self.document.parameters.get("eps", 1e-8) not in (1e-8, "1e-8"):
                refuse("parameters.eps", "is not supported")
            return {"origin": origin}
        return {}

    def _read_switch(self, name: str, *, default: bool) -> bool:
        value = self.document.parameters.get(name, default)
        if not isinstance(value, bool):
            raise RecipeError(f"parameters.{name}: expected true or false, got {value!r}")
        return value


def _check_condition(condition: Any, where: str) -> None:
    is_valid = isinstance(condition, dict) and "value" in condition
    if not is_valid or set(condition) - {"value", "filter"}:
        raise RecipeError(f"parameters.{where}: expected {{filter, value}}, got {condition!r}")


def _drop_unreachable(rules: Rules) -> Rules:
    """Return the rules without those after one for every tensor of the same layers."""
    kept: Rules = []
    decided_layers: list[Any] = []
    for rule in rules:
        if rule.get("layers") in decided_layers or None in decided_layers:
            continue
        kept.append(rule)
        if "pattern" not in rule:
            decided_layers.append(rule.get("layers"))
    return kept


def _make_names(models: Sequence[str]) -> dict[str, str]:
    """Return a name for every model: the last part of its path, made unique."""
    names: dict[str, str] = {}
    for model in models:
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", model.rstrip("/").rpartition("/")[2])[:36] or "model"
        stem = stem if stem[0].isalpha() else f"m-{stem}"
        name, index = stem, 0
        while name in names.values():
            index += 1
            name = f"{stem}-{index}"
        names[model] = name
    return names
