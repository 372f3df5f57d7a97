"""The JSON schema of recipes."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from mmerge.pipeline.recipes.keys import make_recipe_model, to_title
from mmerge.pipeline.recipes.parameter_schedule import numeric_fields, schedule_schema
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Parameters


def make_recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes: one alternative per method."""
    union: Any = None
    for name in method_names():
        model = make_recipe_model(name)
        union = model if union is None else union | model
    schema: dict[str, Any] = TypeAdapter(union).json_schema()
    definitions = schema["$defs"]
    for name in method_names():
        method, title = find_method(name), to_title(name)
        _allow_schedules(definitions[f"{title}Recipe"], method.parameters_model)
        _allow_schedules(definitions[f"{title}Expert"], method.expert_parameters_model)
    header = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmerge recipe",
    }
    return header | schema


def _allow_schedules(definition: dict[str, Any], model: type[Parameters]) -> None:
    properties = definition["properties"]
    for key in numeric_fields(model):
        properties[key] = schedule_schema(dict(properties[key]))
