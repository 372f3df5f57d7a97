"""What the user writes, parsed once at the door: inside, only valid recipes exist."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model

from mmerge.manifests.errors import CheckpointError, RecipeError, StoreError
from mmerge.manifests.format.references import NAME_PATTERN
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.manifests.stores.open import is_local, pin_uri, to_local_path
from mmerge.pipeline.recipes.mergekit import from_mergekit, is_mergekit
from mmerge.pipeline.recipes.parameter_schedule import (
    Schedule,
    numeric_fields,
    resolve,
    schedule_schema,
    take_schedules,
)
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Method, Numbers, Parameters

EXPERT_NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,39}$"
MAX_RECIPE_BYTES = 1 << 20


class RecipeKeys(Parameters):
    """The keys that every recipe may have, whatever its method."""

    name: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        description="the composite's name in its store; the recipe's file name if absent",
    )
    base: str | None = Field(
        None,
        min_length=1,
        description=(
            "folder or URI of the base LLM (Hugging Face layout, safetensors); relative to the"
            " recipe. Some methods do without"
        ),
    )
    output: str = Field(
        min_length=1,
        description=(
            "folder or URI of the store that the composite is written to; relative to the recipe"
        ),
    )
    merge: Literal["all", "linear"] = Field(
        "all",
        description=(
            "merge all shared language-model tensors, or only the linear projections (embeddings,"
            " norms and head stay the base's)"
        ),
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="dtype of what is written; the base's if absent"
    )
    carry: list[str] = Field(
        default_factory=list,
        description=(
            "patterns (with *) of base tensors that are not merged but carried by each expert"
        ),
    )
    non_finite: Literal["error", "keep"] = Field(
        "error", description="what to do about NaN or Inf in an input"
    )
    template: str | None = Field(
        None, description="how a prompt is put together: '{media}' and '{text}' mark the places"
    )


class ExpertKeys(Parameters):
    """The keys that every expert may have, whatever the method."""

    path: str = Field(
        min_length=1, description="folder or URI of the expert's checkpoint; relative to the recipe"
    )
    modality: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,39}$", description="image, audio, video, point, …"
    )
    placeholder: str | None = Field(
        None,
        description=(
            "the text that its processor expands to the media tokens; found from the processor if"
            " absent"
        ),
    )
    template: str | None = Field(
        None, description="text around one medium in a prompt; '{media}' marks its place"
    )


@dataclass(frozen=True)
class Expert:
    """One expert of a recipe."""

    name: str
    uri: str
    modality: str
    parameters: Parameters
    placeholder: str | None
    template: str | None


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. Paths are absolute; parameters are those of the method, complete with
    defaults.
    """

    name: str
    base: str
    """Where the base is; of a recipe without one, the first expert: it names the tensors."""
    has_base: bool
    experts: tuple[Expert, ...]
    method: str
    parameters: Parameters
    merge: Literal["all", "linear"]
    dtype: str | None
    carry: tuple[str, ...]
    non_finite: Literal["error", "keep"]
    output: str
    template: str | None

    schedules: dict[str, dict[str, Schedule]] = field(default_factory=dict)
    """Numbers that differ between tensors: by expert (empty: of the recipe) and key."""

    def numbers_by_tensor(self, names: Sequence[str]) -> dict[str, Numbers]:
        """Return by tensor the parameters that hold for it, complete with defaults.

        Raises:
            RecipeError: the numbers of some tensor do not fit the method.
        """
        method = find_method(self.method)
        num_layers = (
            max((layer for name in names if (layer := layer_of(name)) is not None), default=-1) + 1
        )
        found: dict[str, Numbers] = {}
        known: list[Numbers] = []
        for name in names:
            parameters = self._resolve(
                "", self.parameters, method.parameters_model, name, num_layers
            )
            experts = tuple(
                self._resolve(
                    expert.name, expert.parameters, method.expert_parameters_model, name, num_layers
                )
                for expert in self.experts
            )
            numbers = Numbers(parameters, experts)
            # Tensors with equal numbers share one object: a plan of thousands of tensors stays
            # small.
            if numbers not in known:
                method.check_recipe(
                    method.parameters_model.model_validate(parameters),
                    [method.expert_parameters_model.model_validate(expert) for expert in experts],
                    has_base=self.has_base,
                )
                known.append(numbers)
            found[name] = known[known.index(numbers)]
        return found

    def _resolve(
        self,
        owner: str,
        parameters: Parameters,
        model: type[Parameters],
        name: str,
        num_layers: int,
    ) -> dict[str, Any]:
        return resolve(
            parameters.model_dump(mode="json"),
            self.schedules.get(owner, {}),
            model,
            name=name,
            num_layers=num_layers,
        )

    def describe_parameters(self, expert: str = "") -> dict[str, Any]:
        """Return the parameters as the manifest keeps them, schedules included: of the recipe, or
        of one expert.
        """
        parameters = next(
            (found.parameters for found in self.experts if found.name == expert), self.parameters
        )
        schedules = {
            key: schedule.to_json() for key, schedule in self.schedules.get(expert, {}).items()
        }
        return parameters.model_dump(mode="json") | schedules


@cache
def make_recipe_model(method_name: str) -> type[BaseModel]:
    """Return the pydantic model of recipes with this method: the common keys and the method's own."""
    method = find_method(method_name)
    title = _to_title(method_name)
    expert = create_model(f"{title}Expert", __base__=(ExpertKeys, method.expert_parameters_model))
    experts: Any = dict[str, expert]
    chosen: Any = Literal[method_name]
    model: type[BaseModel] = create_model(
        f"{title}Recipe",
        __base__=(RecipeKeys, method.parameters_model),
        method=(chosen, Field(description=method.source)),
        experts=(
            experts,
            Field(
                min_length=1,
                description="the experts by name, in the order in which sums are taken",
            ),
        ),
    )
    return model


def _to_title(method_name: str) -> str:
    return "".join(word.title() for word in method_name.split("_"))


def make_recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes: one alternative per method."""
    union: Any = None
    for name in method_names():
        model = make_recipe_model(name)
        union = model if union is None else union | model
    schema: dict[str, Any] = TypeAdapter(union).json_schema()
    for name in method_names():
        method = find_method(name)
        for part, owned in (
            ("Recipe", method.parameters_model),
            ("Expert", method.expert_parameters_model),
        ):
            properties = schema["$defs"][f"{_to_title(name)}{part}"]["properties"]
            properties |= {
                key: schedule_schema(dict(properties[key])) for key in numeric_fields(owned)
            }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmerge recipe",
        **schema,
    }


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file: one of this project, or one of mergekit whose method there
    is (docs/mergekit.md).

    Raises:
        RecipeError: the file is missing, no YAML, or not valid; the message begins with the key's
            path.
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
            f"{path}: {len(text):,} characters are no recipe (at most {MAX_RECIPE_BYTES:,})"
        )
    folder = path.absolute().parent
    raw = _parse_yaml(text, where=str(path))
    if is_mergekit(raw):
        raw = from_mergekit(raw, folder=folder, default_name=path.stem)
    return parse_recipe(raw, folder=folder, default_name=path.stem)


def parse_recipe(raw: object, *, folder: Path, default_name: str = "composite") -> Recipe:
    """Return the recipe that a mapping describes; relative paths start at `folder`.

    Raises:
        RecipeError: a key is unknown, missing or has a value that does not fit; the message begins
            with the key's path.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"a recipe is a mapping of keys to values, not a {type(raw).__name__}")
    if "method" not in raw:
        raise RecipeError(f"method: is missing; choose one of {', '.join(method_names())}")
    method = find_method(str(raw["method"]))
    plain, schedules = _take_all_schedules(raw, method)
    try:
        keys: Any = make_recipe_model(method.name).model_validate(plain)
    except ValidationError as error:
        raise RecipeError(_describe(error, method)) from None
    experts = tuple(
        Expert(
            name=_check_expert_name(name),
            uri=_resolve(expert.path, folder),
            modality=expert.modality,
            parameters=method.expert_parameters_model.model_validate(
                _pick(expert, method.expert_parameters_model)
            ),
            placeholder=expert.placeholder,
            template=_check_template(expert.template, f"experts.{name}.template", "{media}"),
        )
        for name, expert in keys.experts.items()
    )
    parameters = method.parameters_model.model_validate(_pick(keys, method.parameters_model))
    method.check_recipe(
        parameters, [expert.parameters for expert in experts], has_base=keys.base is not None
    )
    base = _resolve(keys.base, folder) if keys.base is not None else experts[0].uri
    _refuse_repeats(base if keys.base is not None else None, experts)
    name = keys.name or re.sub(r"[^A-Za-z0-9._-]", "-", default_name)
    if not re.match(NAME_PATTERN, name):
        raise RecipeError(f"name: {name!r} is no valid name: use letters, digits, '.', '_' and '-'")
    return Recipe(
        name=name,
        base=base,
        has_base=keys.base is not None,
        experts=experts,
        method=method.name,
        parameters=parameters,
        merge=keys.merge,
        dtype=keys.dtype,
        carry=tuple(keys.carry),
        non_finite=keys.non_finite,
        output=_resolve(keys.output, folder),
        template=_check_template(keys.template, "template", "{text}"),
        schedules=schedules,
    )


def _take_all_schedules(
    raw: dict[str, Any], method: Method
) -> tuple[dict[str, Any], dict[str, dict[str, Schedule]]]:
    """Return the recipe with plain numbers, and the schedules that stood in their place, by expert
    (empty: of the recipe).
    """
    plain, own = take_schedules(raw, method.parameters_model, path="")
    schedules = {"": own} if own else {}
    experts = plain.get("experts")
    if isinstance(experts, dict):
        plain["experts"] = dict(experts)
        for name, expert in experts.items():
            if isinstance(expert, dict):
                plain["experts"][name], found = take_schedules(
                    expert, method.expert_parameters_model, path=f"experts.{name}."
                )
                schedules |= {name: found} if found else {}
    return plain, schedules


def pin_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every hf:// revision replaced by the commit that it names now. Raises
    CheckpointError.
    """

    def pin(uri: str, owner: str) -> str:
        try:
            return pin_uri(uri)
        except StoreError as error:
            raise CheckpointError(f"{owner}: {Exception.__str__(error)}") from error

    experts = tuple(
        replace(expert, uri=pin(expert.uri, f"expert {expert.name!r}")) for expert in recipe.experts
    )
    return replace(recipe, base=pin(recipe.base, "base"), experts=experts)


def _pick(keys: BaseModel, model: type[Parameters]) -> dict[str, Any]:
    return {name: getattr(keys, name) for name in model.model_fields}


def _resolve(uri: str, folder: Path) -> str:
    if not is_local(uri):
        return uri
    return str((folder / to_local_path(uri).expanduser()).resolve())


def _check_expert_name(name: str) -> str:
    if not re.match(EXPERT_NAME_PATTERN, name):
        raise RecipeError(
            f"experts.{name}: {name!r} is no valid name: a letter, then letters, digits, '_'"
            " and '-'"
        )
    return name


def _check_template(template: str | None, key: str, place: str) -> str | None:
    if template is not None and template.count(place) != 1:
        raise RecipeError(f"{key}: must hold {place} once, got {template!r}")
    return template


def _refuse_repeats(base: str | None, experts: tuple[Expert, ...]) -> None:
    seen = {_same(base): "the base"} if base is not None else {}
    for expert in experts:
        place = _same(expert.uri)
        if place in seen:
            raise RecipeError(
                f"experts.{expert.name}.path: {expert.uri} is {seen[place]} already; give every"
                " expert once"
            )
        seen[place] = f"expert {expert.name!r}"


def _same(uri: str) -> str:
    return str(to_local_path(uri).resolve()) if is_local(uri) else uri.rstrip("/")


class _UniqueKeysLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, *, where: str) -> object:
    try:
        return yaml.load(text, Loader=_UniqueKeysLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: no valid YAML ({error})") from None


def _describe(error: ValidationError, method: Method) -> str:
    lines = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"]) or "recipe"
        if detail["type"] == "extra_forbidden":
            in_expert = len(detail["loc"]) > 1
            common, own = (
                (ExpertKeys, method.expert_parameters_model)
                if in_expert
                else (RecipeKeys, method.parameters_model)
            )
            known = (
                [*common.model_fields, *own.model_fields]
                if in_expert
                else ["method", "experts", *common.model_fields, *own.model_fields]
            )
            lines.append(
                f"{path}: unknown key for method {method.name!r}; known are {', '.join(known)}"
            )
        elif detail["type"] == "missing":
            lines.append(f"{path}: is missing")
        elif detail["type"] == "value_error":
            lines.append(f"{path}: {detail['ctx']['error']}")
        else:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            lines.append(
                f"{path}: {message.replace('input should', 'should')}, got {detail['input']!r}"
            )
    return "\n  ".join(lines)
