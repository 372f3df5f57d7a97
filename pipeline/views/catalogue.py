"""The methods there are, with parameters and sources: for people on the command line, and as the
tables of docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape

from mmerge.pipeline.recipes.parameter_schedule import is_number
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Method, Parameters


@dataclass(frozen=True)
class ParameterLine:
    """One parameter of a method."""

    name: str
    """With `experts.NAME.` before it where each expert may have its own."""
    default: str
    """Empty for a parameter that must be given, or that takes another's value."""
    choices: tuple[str, ...]
    is_required: bool
    is_number: bool
    """Whether it may differ from tensor to tensor."""
    description: str


def list_parameters(method: Method) -> Iterator[ParameterLine]:
    """Yield the parameters of a method: of the recipe, then of each expert."""
    for place, model in (
        ("", method.parameters_model),
        ("experts.NAME.", method.expert_parameters_model),
    ):
        yield from _list_fields(place, model)


def _list_fields(place: str, model: type[Parameters]) -> Iterator[ParameterLine]:
    for name, field in model.model_fields.items():
        default = (
            ""
            if field.is_required() or field.default is None
            else _to_yaml(field.get_default(call_default_factory=True))
        )
        choices = tuple(choice for choice in get_args(field.annotation) if isinstance(choice, str))
        yield ParameterLine(
            place + name,
            default,
            choices,
            field.is_required(),
            is_number(field.annotation),
            field.description or "",
        )


def _to_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_experts(method: Method) -> str:
    """Return how many experts a method takes, and whether it needs a base."""
    low, high = method.min_experts, method.max_experts
    count = (
        f"{low}" if low == high else f"{low} to {high}" if high is not None else f"{low} or more"
    )
    noun = "expert" if count == "1" else "experts"
    return f"{count} {noun}" + ("" if method.needs_base else ", the base may be left out")


def summarise(method: Method) -> str:
    """Return the first line of a method's description."""
    return (type(method).__doc__ or "").strip().splitlines()[0]


def print_methods(console: Console) -> None:
    """Print every method with its parameters and its source."""
    for method in map(find_method, method_names()):
        console.print(
            f"[bold]{method.name}[/] ({method.kind}; {describe_experts(method)}):"
            f" {escape(summarise(method))}"
        )
        console.print(f"  {escape(method.source)}")
        for line in list_parameters(method):
            default = (
                " (required)"
                if line.is_required
                else f" (default {line.default})"
                if line.default
                else ""
            )
            choices = f" [{', '.join(line.choices)}]" if line.choices else ""
            console.print(
                f"    {line.name}{default}: {escape(line.description + choices)}", highlight=False
            )
    console.print(
        "\nA number may also be a gradient over depth, or rules by layers and tensor names:"
        " docs/methods.md",
        highlight=False,
    )


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
        found = list(list_parameters(method))
        if not found:
            lines.append("No parameters.")
            continue
        lines += ["| parameter | default | meaning |", "|---|---|---|"]
        for line in found:
            choices = (
                f" ({', '.join(f'`{choice}`' for choice in line.choices)})" if line.choices else ""
            )
            default = "required" if line.is_required else line.default
            lines.append(_to_row((f"`{line.name}`", default, line.description + choices)))
    return "\n".join(lines) + "\n"


def _to_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
