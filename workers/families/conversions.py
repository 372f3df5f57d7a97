"""How a class of transformers forms a parameter of the tensors in its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversion:
    """How a class forms one of its parameters of several tensors in the files, or of another form.

    `steps` are the operations of transformers with their dimensions: `MergeModulelist 0`.
    """

    steps: tuple[str, ...]
    position: int
    """Of this tensor's pattern among those that the parameter is formed of."""
    index: int | None
    """Number of the expert that the tensor belongs to, None where the name has none."""
    compares_shapes: bool
    """Whether a tensor that has the parameter's shape is taken as it is."""


def describe_conversion(pattern: str, tail: str, converters: Sequence[Any]) -> Conversion | None:
    """Return how a tensor is converted whose name fits a pattern, None where that is unclear.

    Args:
        pattern: of a converter.
        tail: of the tensor's name, from where it differs from the parameter's.
        converters: of the class.
    """
    fitting = [item for item in converters if pattern in item.source_patterns]
    if len(fitting) != 1 or len(fitting[0].target_patterns) != 1:
        return None
    number = re.match(r"[0-9]+", tail)
    operations = fitting[0].operations
    return Conversion(
        steps=tuple(_describe_operation(operation) for operation in operations),
        position=fitting[0].source_patterns.index(pattern),
        index=int(number[0]) if number and "*" in pattern else None,
        compares_shapes=any(getattr(item, "check_dims", False) for item in operations),
    )


def _describe_operation(operation: Any) -> str:
    """Return the name of an operation and its dimensions."""
    dimensions = [
        getattr(operation, key) for key in ("dim", "dim0", "dim1") if hasattr(operation, key)
    ]
    return " ".join([type(operation).__name__, *map(str, dimensions)])
