"""The merge methods with parameters and sources: `mmerge methods` and docs/methods.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console

from mmerge.pipeline.monitoring.printable import escape
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Method, Parameters


@dataclass(frozen=True)
class ParameterLine:
    """One parameter of a method."""

    name: str
    """With the prefix `experts.NAME.` if every expert may have its own value."""
    default: str
    """Empty for a required parameter, and for one that defaults to the value of another."""
    choices: tuple[str, ...]
    is_required: bool
    description: str


def list_parameters(method: Method) -> Iterator[ParameterLine]:
    """Yield the parameters of a method: of the recipe, then of every expert."""
    yield from _list_fields("", method.parameters_model)
    yield from _list_fields("experts.NAME.", method.expert_parameters_model)


def _list_fields(prefix: str, model: type[Parameters]) -> Iterator[ParameterLine]:
    for name, field in model.model_fields.items():
        default = ""
        if not field.is_required() and field.default is not None:
            default = _to_yaml(field.get_default(call_default_factory=True))
        yield ParameterLine(
            name=prefix + name,
            default=default,
            choices=tuple(item for item in get_args(field.annotation) if isinstance(item, str)),
            is_required=field.is_required(),
            description=field.description or "",
        )


def _to_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_experts(method: Method) -> str:
    """Return how many experts a method takes, and whether it works without a base."""
    low, high = method.min_experts, method.max_experts
    count = f"{low} or more" if high is None else f"{low} to {high}"
    if low == high:
        count = str(low)
    noun = "expert" if count == "1" else "experts"
    return f"{count} {noun}" + ("" if method.needs_base else ", the base may be left out")


def summarise(method: Method) -> str:
    """Return the first paragraph of a method's description, on one line."""
    docstring = inspect.cleandoc(type(method).__doc__ or "")
    return " ".join(docstring.partition("\n\n")[0].split())


def print_methods(console: Console) -> None:
    """Print every method with its parameters and its source."""
    for method in map(find_method, method_names()):
        console.print(
            f"[bold]{method.name}[/] ({method.kind}; {describe_experts(method)}):"
            f" {escape(summarise(method))}"
        )
        console.print(f"  {escape(method.source)}")
        for line in list_parameters(method):
            console.print(f"    {escape(_to_text(line))}", highlight=False)
    console.print(
        "\nA number may also be a gradient over the layers, or rules by layer and tensor name:"
        " docs/methods.md",
        highlight=False,
    )


def _to_text(line: ParameterLine) -> str:
    default = ""
    if line.is_required:
        default = " (required)"
    elif line.default:
        default = f" (default {line.default})"
    choices = f" [{', '.join(line.choices)}]" if line.choices else ""
    return f"{line.name}{default}: {line.description}{choices}"


def methods_to_markdown() -> str:
    """Return the tables of docs/methods.md: all methods, then the parameters of each."""
    lines = ["| method | build | takes | what it computes | source |", "|---|---|---|---|---|"]
    for method in map(find_method, method_names()):
        cells = (
            f"[`{method.name}`](#{method.name})",
            method.kind,
            describe_experts(method),
            summarise(method),
            method.source,
        )
        lines.append(_to_row(cells))
    for method in map(find_method, method_names()):
        lines += ["", f"### {method.name}", ""]
        parameters = list(list_parameters(method))
        if not parameters:
            lines.append("No parameters.")
            continue
        lines += ["| parameter | default | meaning |", "|---|---|---|"]
        for line in parameters:
            choices = ", ".join(f"`{choice}`" for choice in line.choices)
            meaning = f"{line.description} ({choices})" if choices else line.description
            default = "required" if line.is_required else line.default
            lines.append(_to_row((f"`{line.name}`", default, meaning)))
    return "\n".join(lines) + "\n"


def _to_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
