"""mergekit's YAML as a recipe: the same methods under the names they have here.

The arithmetic follows mergekit's documentation: trimming per tensor with an exact count, a zero sum
counted as positive, DARE and DELLA rescaled by norms. It runs in float32 and rounds once to
`out_dtype` or `dtype`; random numbers are this project's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.input_parsing import RESERVED_OWNERS
from mmerge.pipeline.recipes.mergekit_document import MergekitDocument
from mmerge.pipeline.recipes.mergekit_inputs import MergekitExpert, MergekitInputs, make_names
from mmerge.pipeline.recipes.mergekit_methods import (
    ALTERNATIVES,
    BASE_AS_MODEL,
    BASE_COUNTED,
    BASE_WITHOUT_EFFECT,
    SWITCHES,
    TRANSLATIONS,
    list_translated_methods,
)
from mmerge.pipeline.recipes.mergekit_models import Slice, refuse
from mmerge.pipeline.recipes.mergekit_tokenizer import translate_template, translate_tokenizer
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
                f"merge_method: {self.method!r} has no counterpart here{_nearest(self.method)}."
                f" Supported are {', '.join(translated_methods)}"
            )
        self.translation = TRANSLATIONS[self.method]
        self.inputs = MergekitInputs(
            document,
            takes_base_as_model=self.method in BASE_COUNTED,
            ignores_base=self.method in BASE_WITHOUT_EFFECT,
        )

    def translate(self, default_name: str) -> dict[str, Any]:
        """Return the recipe as a mapping. Raises RecipeError."""
        document, translation = self.document, self.translation
        self._check_parameters(document.slices)
        experts = self.inputs.experts
        self._check_experts(experts)
        recipe: dict[str, Any] = {
            "method": translation.method,
            "output": f"{default_name}-composite",
            **translation.choices,
        }
        dtype = document.raw.get("out_dtype") or document.raw.get("dtype")
        if dtype is not None:
            recipe["dtype"] = dtype
        for mergekit_name, name in translation.recipe_parameters.items():
            recipe |= self._translate_parameter(mergekit_name, name, expert=None)
        recipe |= self.translate_special()
        tokenizer = translate_tokenizer(document, has_base=self._keeps_base(experts))
        names = make_names(experts, reserved=RESERVED_OWNERS if tokenizer else ())
        recipe["experts"] = {
            name: self._make_expert(expert) for name, expert in zip(names, experts, strict=True)
        }
        if self._keeps_base(experts):
            recipe |= self.inputs.translate_base()
        for key, value in {
            "tokenizer": tokenizer,
            "chat_template": translate_template(document),
            "keep": self.inputs.list_kept(),
        }.items():
            if value:
                recipe[key] = value
        return recipe

    def _keeps_base(self, experts: Sequence[MergekitExpert]) -> bool:
        """Return whether the recipe has a base: not where base_model is one of the experts."""
        if not self.inputs.has_base:
            return False
        if find_method(self.translation.method).needs_base:
            return True
        sources = [source for expert in experts for source in expert.sources]
        return not any(self.document.is_base(source.model) for source in sources)

    def _check_experts(self, experts: Sequence[MergekitExpert]) -> None:
        if self.method in BASE_AS_MODEL:
            if self.document.base is None:
                raise RecipeError(
                    f"base_model: is missing; {self.method} needs it as one of its two models"
                )
            if len(experts) != 1:
                raise RecipeError(
                    f"models: {self.method} takes one model beside base_model, got {len(experts)}."
                    " mergekit refuses others too"
                )
        if self.method == "passthrough" and len(experts) != 1:
            raise RecipeError(
                f"models: passthrough takes one model in every slice, got {len(experts)}"
            )
        if not experts:
            raise RecipeError("models: none is left beside base_model")

    def _check_parameters(self, slices: Sequence[Slice]) -> None:
        """Refuse parameters that the method does not have; mergekit reads all at every level."""
        known_parameters = self.translation.known_parameters
        levels = [("parameters", self.document.parameters)]
        for part in slices:
            levels.append(("slices.parameters", part.parameters))
            for source in part.sources:
                levels.append((f"{source.model}.parameters", source.parameters))
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

    def _make_expert(self, expert: MergekitExpert) -> dict[str, Any]:
        keys: dict[str, Any] = {**self.inputs.place_of(expert), "modality": "text"}
        for mergekit_name, name in self.translation.model_parameters.items():
            keys |= self._translate_parameter(mergekit_name, name, expert=expert)
        return keys

    def _translate_parameter(
        self, mergekit_name: str, name: str, *, expert: MergekitExpert | None
    ) -> dict[str, Any]:
        """Return {name: value or schedule}; empty where mergekit's default is a recipe's."""
        defaults = self.translation.defaults
        rules: Rules = []
        for index, part in enumerate(self.document.slices):
            # The innermost level decides.
            levels = [part.parameters.get(mergekit_name)]
            levels.append(self.document.parameters.get(mergekit_name))
            if expert is not None:
                levels.insert(0, expert.sources[index].parameters.get(mergekit_name))
            for level in levels:
                if level is not None:
                    rules += self._to_rules(level, part.layers, where=mergekit_name)
        if not rules:
            if mergekit_name in self.translation.required:
                owner = f"{expert.sources[0].model}." if expert else ""
                raise RecipeError(
                    f"{owner}parameters.{mergekit_name}: is missing; mergekit's {self.method}"
                    f" demands it{self._explain_base(expert)}"
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

    def _explain_base(self, expert: MergekitExpert | None) -> str:
        """Return why base_model needs a parameter where it is not listed under models."""
        if expert is None or not self.document.is_base(expert.sources[0].model):
            return ""
        return (
            f". base_model is one of the models of {self.method}: list it with its own, or leave"
            " base_model out"
        )

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


def _nearest(method: str) -> str:
    """Return what to use in place of a method that has no counterpart."""
    similar = get_close_matches(method, list_translated_methods(), n=1)
    alternative = ALTERNATIVES.get(method) or next(iter(similar), None)
    return f"; nearest to it is {alternative}" if alternative else ""
