"""Recipe files and mappings parsed once, into valid recipes with absolute paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.open import is_local, to_local_path
from mmerge.pipeline.recipes.keys import make_recipe_model
from mmerge.pipeline.recipes.mergekit import from_mergekit, is_mergekit
from mmerge.pipeline.recipes.parameter_schedule import Schedule, take_schedules
from mmerge.pipeline.recipes.recipe import Expert, Recipe
from mmerge.pipeline.recipes.validation import (
    check_distinct,
    check_expert_name,
    check_name,
    check_template,
    describe_errors,
)
from mmerge.pipeline.recipes.yaml_text import parse_yaml
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Method, Parameters

MAX_RECIPE_BYTES = 1 << 20


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file, which may be a mergekit YAML (docs/methods.md).

    Raises:
        RecipeError: the file is missing, malformed or not valid; the message begins with the path
            of the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"{path}: has {len(text):,} characters, a recipe at most {MAX_RECIPE_BYTES:,}"
        )
    folder = path.absolute().parent
    raw = parse_yaml(text, where=str(path))
    if is_mergekit(raw):
        raw = from_mergekit(raw, folder=folder, default_name=path.stem)
    return parse_recipe(raw, folder=folder, default_name=path.stem)


def parse_recipe(raw: object, *, folder: Path, default_name: str = "composite") -> Recipe:
    """Return the recipe that a mapping describes.

    Args:
        raw: the mapping.
        folder: where relative paths start.
        default_name: name of the composite if the recipe gives none.

    Raises:
        RecipeError: a key is unknown, missing or has a value that does not fit; the message begins
            with the path of the key.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"a recipe is a mapping of keys to values, got a {type(raw).__name__}")
    if "method" not in raw:
        raise RecipeError(f"method: is missing. Choose one of {', '.join(method_names())}")
    method = find_method(str(raw["method"]))
    plain, schedules = _take_all_schedules(raw, method)
    try:
        keys: Any = make_recipe_model(method.name).model_validate(plain)
    except ValidationError as error:
        raise RecipeError(describe_errors(error, method)) from None
    experts = tuple(
        _make_expert(name, expert_keys, method, folder)
        for name, expert_keys in keys.experts.items()
    )
    parameters = _select_parameters(keys, method.parameters_model)
    method.check_recipe(
        parameters, [expert.parameters for expert in experts], has_base=keys.base is not None
    )
    base = None if keys.base is None else _to_absolute(keys.base, folder)
    check_distinct(base, experts)
    return Recipe(
        name=check_name(keys.name or re.sub(r"[^A-Za-z0-9._-]", "-", default_name)),
        base=experts[0].uri if base is None else base,
        has_base=base is not None,
        experts=experts,
        method=method.name,
        parameters=parameters,
        merge=keys.merge,
        dtype=keys.dtype,
        carry=tuple(keys.carry),
        non_finite=keys.non_finite,
        output=_to_absolute(keys.output, folder),
        template=check_template(keys.template, key="template", place="{text}"),
        schedules=schedules,
    )


def _make_expert(name: str, keys: Any, method: Method, folder: Path) -> Expert:
    return Expert(
        name=check_expert_name(name),
        uri=_to_absolute(keys.path, folder),
        modality=keys.modality,
        parameters=_select_parameters(keys, method.expert_parameters_model),
        placeholder=keys.placeholder,
        template=check_template(keys.template, key=f"experts.{name}.template", place="{media}"),
    )


def _take_all_schedules(
    raw: Mapping[str, Any], method: Method
) -> tuple[dict[str, Any], dict[str, dict[str, Schedule]]]:
    """Return the recipe with plain numbers, and the schedules that were in their place.

    Schedules are by expert (empty: of the recipe) and key.
    """
    schedules: dict[str, dict[str, Schedule]] = {}
    plain, recipe_schedules = take_schedules(raw, method.parameters_model, path="")
    if recipe_schedules:
        schedules[""] = recipe_schedules
    experts = plain.get("experts")
    if not isinstance(experts, dict):
        return plain, schedules
    plain["experts"] = dict(experts)
    for name, expert in experts.items():
        if not isinstance(expert, dict):
            continue
        plain["experts"][name], expert_schedules = take_schedules(
            expert, method.expert_parameters_model, path=f"experts.{name}."
        )
        if expert_schedules:
            schedules[name] = expert_schedules
    return plain, schedules


def _select_parameters(keys: BaseModel, model: type[Parameters]) -> Parameters:
    """Return the parameters of the method among all keys."""
    return model.model_validate({name: getattr(keys, name) for name in model.model_fields})


def _to_absolute(uri: str, folder: Path) -> str:
    if not is_local(uri):
        return uri
    return str((folder / to_local_path(uri).expanduser()).resolve())
