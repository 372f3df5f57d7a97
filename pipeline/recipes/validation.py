"""Checks of a recipe beyond its types, and the messages of those that fail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.format.references import NAME_PATTERN
from mmerge.manifests.stores.open import is_local, to_local_path
from mmerge.pipeline.recipes.inputs import LayerSlice, ModelPlace, map_place, map_slices
from mmerge.pipeline.recipes.keys import ExpertKeys, RecipeKeys
from mmerge.pipeline.recipes.recipe import Expert
from mmerge.workers.methods.interface import Method

MAX_SHOWN = 200
"""Characters of a wrong value that a message repeats."""
EXPERT_NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,39}$"


def describe_errors(error: ValidationError, method: Method) -> str:
    """Return one line per invalid key, each beginning with the key's path."""
    return "\n  ".join(_describe_error(detail, method) for detail in error.errors())


def _describe_error(detail: ErrorDetails, method: Method) -> str:
    path = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        known_keys = _list_known_keys(method, in_expert=len(detail["loc"]) > 1)
        similar_keys = get_close_matches(str(detail["loc"][-1]), known_keys, n=1)
        hint = f" Did you mean {similar_keys[0]!r}?" if similar_keys else ""
        return (
            f"{path}: unknown key for method {method.name!r}.{hint} Known keys:"
            f" {', '.join(known_keys)}"
        )
    if detail["type"] == "missing":
        return f"{path}: is missing"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    hint = ""
    if isinstance(detail["input"], bool):
        hint = " (YAML reads yes, no, on and off as true and false: put text into quotes)"
    shown = repr(detail["input"])
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"
    return f"{path}: {message.replace('input should', 'should')}, got {shown}{hint}"


def _list_known_keys(method: Method, *, in_expert: bool) -> list[str]:
    if in_expert:
        return [*ExpertKeys.model_fields, *method.expert_parameters_model.model_fields]
    own_keys = method.parameters_model.model_fields
    return ["method", "experts", *RecipeKeys.model_fields, *own_keys]


def check_name(name: str) -> str:
    """Return the name of a composite. Raises RecipeError for characters that are not allowed."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise RecipeError(f"name: {name!r} is no valid name. Use letters, digits, '.', '_' and '-'")
    return name


def check_expert_name(name: str) -> str:
    """Return the name of an expert. Raises RecipeError for characters that are not allowed."""
    if not re.fullmatch(EXPERT_NAME_PATTERN, name):
        raise RecipeError(
            f"experts.{name}: {name!r} is no valid name. Use a letter, then letters, digits, '_'"
            " and '-'"
        )
    return name


def check_template(template: str | None, *, key: str, place: str) -> str | None:
    """Return a template. Raises RecipeError unless it has its place exactly once."""
    if template is not None and template.count(place) != 1:
        raise RecipeError(f"{key}: must contain {place} once, got {template!r}")
    return template


def check_chat_template(
    source: str | None, *, template: str | None, experts: Sequence[Expert]
) -> str | None:
    """Return whose chat template a recipe chooses. Raises RecipeError if it has none, or no effect.

    Args:
        source: the value of `chat_template_from`.
        template: that of the recipe, which takes the place of chat templates.
        experts: of the recipe.
    """
    if source is None:
        return None
    if template is not None:
        raise RecipeError(
            "chat_template_from: has no effect beside 'template', which takes the place of chat"
            " templates. Leave one of them out"
        )
    names = [expert.name for expert in experts]
    if source not in ("base", "none", *names):
        raise RecipeError(
            f"chat_template_from: expected 'base', 'none' or an expert ({', '.join(names)}), got"
            f" {source!r}"
        )
    return source


def check_distinct(
    base: ModelPlace | None,
    experts: Sequence[Expert],
    *,
    base_slices: tuple[LayerSlice, ...] = (),
) -> None:
    """Raise RecipeError if two experts, or an expert and the base, are the same layers of the same
    checkpoint.
    """
    owners: dict[object, str] = {}
    if base is not None:
        owners[_identify(base, base_slices)] = "the base"
    for expert in experts:
        identity = _identify(expert.place, expert.slices)
        if identity in owners:
            raise RecipeError(
                f"experts.{expert.name}.path: {expert.uri} is {owners[identity]} already. Name"
                " every checkpoint once"
            )
        owners[identity] = f"expert {expert.name!r}"


def _identify(place: ModelPlace, slices: tuple[LayerSlice, ...]) -> object:
    return map_place(place, _resolve), map_slices(slices, _resolve)


def _resolve(uri: str) -> str:
    return str(to_local_path(uri).resolve()) if is_local(uri) else uri.rstrip("/")
