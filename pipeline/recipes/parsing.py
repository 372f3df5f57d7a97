"""Recipe files and mappings parsed once, into valid recipes with absolute paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mmerge.manifests import limits
from mmerge.manifests.errors import RecipeError, StoreError
from mmerge.manifests.regular_file import describe_os_error, read_regular_file
from mmerge.manifests.stores.open import check_uri, is_local, is_unicode, to_local_path
from mmerge.pipeline.recipes.input_parsing import (
    parse_chat_template,
    parse_slices,
    parse_vocabulary,
)
from mmerge.pipeline.recipes.inputs import LayerSlice, ModelPlace
from mmerge.pipeline.recipes.keys import make_recipe_model
from mmerge.pipeline.recipes.mergekit import from_mergekit, is_mergekit
from mmerge.pipeline.recipes.parameter_schedule import Schedule, take_schedules
from mmerge.pipeline.recipes.recipe import Expert, Recipe
from mmerge.pipeline.recipes.validation import (
    check_chat_template,
    check_distinct,
    check_expert_name,
    check_name,
    check_template,
    describe_errors,
)
from mmerge.pipeline.recipes.yaml_text import parse_yaml
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Method, Parameters


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file, which may be a mergekit YAML (docs/methods.md).

    Raises:
        RecipeError: the file is missing, malformed or not valid; the message begins with the path
            of the key.
    """
    path = Path(path)
    raw = read_recipe_mapping(path)
    return parse_recipe(raw, folder=path.absolute().parent, default_name=path.stem)


def read_recipe_mapping(path: Path) -> object:
    """Return the mapping in a recipe file, that of a mergekit YAML translated.

    Raises:
        RecipeError: as `read_recipe`; the keys of this project's recipes are not checked yet.
    """
    try:
        text = read_regular_file(path, limit=limits.RECIPE_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error})") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({describe_os_error(error)})") from error
    raw = parse_yaml(text, where=str(path))
    if is_mergekit(raw):
        return from_mergekit(raw, folder=path.absolute().parent, default_name=path.stem)
    return raw


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
    if not all(isinstance(key, str) for key in raw):
        raise RecipeError("a recipe is a mapping whose keys are text")
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
    base, base_slices = _parse_base(keys, experts[0], folder)
    check_distinct(base if keys.base else None, experts, base_slices=base_slices)
    return Recipe(
        name=check_name(keys.name or re.sub(r"[^A-Za-z0-9._-]", "-", default_name)),
        base=base.uri,
        base_adapter=base.adapter,
        base_slices=base_slices,
        has_base=keys.base is not None,
        experts=experts,
        method=method.name,
        parameters=parameters,
        merge=keys.merge,
        dtype=keys.dtype,
        carry=tuple(keys.carry),
        keep=tuple(keys.keep),
        vocabulary=parse_vocabulary(
            keys.tokenizer,
            list(keys.experts),
            to_absolute=lambda uri, key: _to_absolute(uri, folder, key=key),
        ),
        chat_template=parse_chat_template(keys.chat_template),
        non_finite=keys.non_finite,
        output=_to_output(keys.output, folder),
        template=check_template(keys.template, key="template", place="{text}"),
        chat_template_from=check_chat_template(
            keys.chat_template_from, template=keys.template, experts=experts
        ),
        schedules=schedules,
    )


def _parse_base(
    keys: Any, first_expert: Expert, folder: Path
) -> tuple[ModelPlace, tuple[LayerSlice, ...]]:
    """Return place and slices of the base; those of the first expert in a recipe without one."""
    if keys.base is None:
        for key in ("base_lora", "base_slices"):
            if getattr(keys, key) is not None:
                raise RecipeError(f"{key}: is given without 'base'")
        return first_expert.place, first_expert.slices
    place = _parse_place(keys.base, keys.base_lora, folder, key="base", adapter_key="base_lora")
    return place, parse_slices(
        keys.base_slices,
        place,
        key="base_slices",
        to_absolute=lambda uri, key: _to_absolute(uri, folder, key=key),
    )


def _parse_place(
    uri: str, adapter: str | None, folder: Path, *, key: str, adapter_key: str
) -> ModelPlace:
    place = ModelPlace(_to_absolute(uri, folder, key=key))
    if adapter is None:
        return place
    return ModelPlace(place.uri, _to_absolute(adapter, folder, key=adapter_key))


def _make_expert(name: str, keys: Any, method: Method, folder: Path) -> Expert:
    where = f"experts.{name}"
    place = _parse_place(
        keys.path, keys.lora, folder, key=f"{where}.path", adapter_key=f"{where}.lora"
    )
    return Expert(
        name=check_expert_name(name),
        uri=place.uri,
        adapter=place.adapter,
        slices=parse_slices(
            keys.slices,
            place,
            key=f"{where}.slices",
            to_absolute=lambda uri, key: _to_absolute(uri, folder, key=key),
        ),
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


def _to_absolute(uri: str, folder: Path, *, key: str) -> str:
    """Return a URI, or the absolute path of a local folder. Raises RecipeError."""
    try:
        check_uri(uri)
        if not is_local(uri):
            return uri
        path = str((folder / to_local_path(uri).expanduser()).resolve())
    except StoreError as error:
        raise RecipeError(f"{key}: {Exception.__str__(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, links in a circle, no home
        raise RecipeError(f"{key}: {uri!r} is no path ({error})") from error
    if not is_unicode(path):
        raise RecipeError(
            f"{key}: {path!r} has a name that is not UTF-8, which a manifest cannot hold. Rename it"
        )
    return path


def _to_output(uri: str, folder: Path) -> str:
    output = _to_absolute(uri, folder, key="output")
    if "#" in output:
        raise RecipeError(
            f"output: {output} has a '#', which separates a store from a composite's name"
            " (STORE#NAME). Choose a folder without it"
        )
    return output
