"""Parameter schedules: values that depend on a tensor's layer or name, or on depth.

Instead of a number, a recipe may give

    density: [0.2, 0.8]                              a gradient from the first to the last layer
    density:                                         rules; the first that matches applies
      - {value: 0.5, layers: [0, 15]}                layers 0 to 15, both included
      - {value: [0.2, 0.6], pattern: "*self_attn*"}  names that match a pattern; a gradient
      - {value: 0.3}                                 all other tensors

The gradient of a rule with `layers` runs over those layers. Embeddings count as before the first
layer, the last norm and the head as after the last. If no rule matches, the parameter has its
default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.families.registry import is_before_layers
from mmerge.workers.methods.interface import Parameters

Number = float | int


class Rule(BaseModel):
    """One rule of a schedule: a value or a gradient, and the tensors for which it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: Number | list[Number] = Field(
        description="a number, or a gradient over the rule's layers"
    )
    layers: tuple[int, int] | None = Field(
        None, description="first and last layer, both included; −1 is the embedding"
    )
    pattern: str | None = Field(None, min_length=1, description="tensor names, with *")

    def holds(self, name: str, position: int) -> bool:
        """Return whether the rule applies to a tensor at this position among the layers."""
        if self.pattern is not None and not fnmatchcase(name, self.pattern):
            return False
        return self.layers is None or self.layers[0] <= position <= self.layers[1]

    def at(self, position: int, num_layers: int) -> Number:
        """Return the rule's value at a position; gradients are interpolated linearly."""
        if not isinstance(self.value, list):
            return self.value
        first, last = self.layers or (0, num_layers - 1)
        first, last = max(first, 0), min(last, num_layers - 1)
        at = min(max(position, first), last)
        depth = 0.0 if position < first else 1.0 if last == first else (at - first) / (last - first)
        scaled = depth * (len(self.value) - 1)
        low = min(int(scaled), len(self.value) - 1)
        high, share = min(low + 1, len(self.value) - 1), scaled - low
        return (
            self.value[low]
            if share == 0
            else (1 - share) * self.value[low] + share * self.value[high]
        )

    def values(self) -> list[Number]:
        """Return all values of the rule."""
        return self.value if isinstance(self.value, list) else [self.value]


@dataclass(frozen=True)
class Schedule:
    """The rules that a recipe gives in place of one value."""

    rules: tuple[Rule, ...]

    def at(self, name: str, num_layers: int) -> Number | None:
        """Return the value for a tensor, None if no rule matches."""
        position = find_position(name, num_layers)
        return next(
            (rule.at(position, num_layers) for rule in self.rules if rule.holds(name, position)),
            None,
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return the schedule as rules in JSON."""
        return [rule.model_dump(mode="json", exclude_none=True) for rule in self.rules]


def find_position(name: str, num_layers: int) -> int:
    """Return a tensor's layer; −1 for embeddings, `num_layers` for last norm and head."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    return -1 if is_before_layers(name) else num_layers


def is_number(annotation: Any) -> bool:
    """Return whether a field of this type is a number and accepts a schedule."""
    if annotation in (float, int):
        return True
    return any(is_number(part) for part in getattr(annotation, "__args__", ()))


def numeric_fields(model: type[Parameters]) -> list[str]:
    """Return the fields of a parameter model that accept a schedule."""
    return [name for name, field in model.model_fields.items() if is_number(field.annotation)]


def take_schedules(
    raw: Mapping[str, Any], model: type[Parameters], *, path: str
) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """Separate a recipe's plain values from its schedules.

    Returns:
        the mapping with each schedule replaced by its first value, and the schedules by key.

    Raises:
        RecipeError: a schedule is not valid; the message begins with the key's path.
    """
    plain, schedules = dict(raw), {}
    for key in numeric_fields(model):
        value = plain.get(key)
        if isinstance(value, list):
            schedules[key] = parse_schedule(value, model, key, path=f"{path}{key}")
            plain[key] = schedules[key].rules[0].values()[0]
    return plain, schedules


def parse_schedule(
    value: Sequence[Any], model: type[Parameters], key: str, *, path: str
) -> Schedule:
    """Parse the list that a recipe gives in place of a number. Raises RecipeError."""
    if not value:
        raise RecipeError(
            f"{path}: is an empty list; give numbers (a gradient over depth) or rules {{value,"
            " layers, pattern}"
        )
    items = (
        list(value) if any(isinstance(item, dict) for item in value) else [{"value": list(value)}]
    )
    field = model.model_fields[key]
    kind: Any = Annotated[(field.annotation, field, *field.metadata)]
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    rules = []
    for index, item in enumerate(items):
        where = f"{path}.{index}"
        try:
            rule = Rule.model_validate(item)
            for number in rule.values():
                adapter.validate_python(number)
        except ValidationError as error:
            detail = error.errors()[0]
            reason = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
            raise RecipeError(
                f"{where}: {reason}; a rule has a 'value', and may have 'layers: [first, last]' and"
                " a 'pattern'"
            ) from None
        if isinstance(rule.value, list) and not rule.value:
            raise RecipeError(f"{where}.value: is an empty list")
        if rule.layers is not None and rule.layers[0] > rule.layers[1]:
            raise RecipeError(f"{where}.layers: {list(rule.layers)} ends before it begins")
        rules.append(rule)
    for index, rule in enumerate(rules[:-1]):
        if rule.layers is None and rule.pattern is None:
            raise RecipeError(
                f"{path}.{index}: holds for every tensor, so the rules after it have no effect."
                " Move it to the end"
            )
    return Schedule(tuple(rules))


def resolve(
    parameters: Mapping[str, Any],
    schedules: Mapping[str, Schedule],
    model: type[Parameters],
    *,
    name: str,
    num_layers: int,
) -> dict[str, Any]:
    """Return the parameters of one tensor."""
    resolved = dict(parameters)
    for key, schedule in schedules.items():
        number = schedule.at(name, num_layers)
        if number is None and model.model_fields[key].is_required():
            raise RecipeError(
                f"{key}: no rule fits {name}, and there is no default. Add a rule without 'layers'"
                " and 'pattern' at the end"
            )
        resolved[key] = model.model_fields[key].get_default() if number is None else number
    return resolved


def schedule_schema(number: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a number or a schedule of that number."""
    kept: dict[str, Any] = {
        key: number.pop(key) for key in ("default", "description", "title") if key in number
    }
    rule = Rule.model_json_schema()
    return kept | {
        "anyOf": [
            number,
            {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 1,
                "description": "a gradient over depth",
            },
            {
                "type": "array",
                "items": rule,
                "minItems": 1,
                "description": "rules; the first that fits a tensor decides",
            },
        ]
    }
