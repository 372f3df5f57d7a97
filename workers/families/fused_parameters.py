"""Parameters that files hold in several tensors or transposed: which rows each tensor has.

Mixtures of experts are one parameter [experts, rows, columns] per projection in memory, and one
matrix per expert in most files. The conversions of transformers say how the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mmerge.workers.families.conversions import Conversion
from mmerge.workers.families.name_map import NameMap, parameter_of

_STACKS = ("MergeModulelist 0",), ("MergeModulelist 0", "Concatenate 1")
"""Conversions of one matrix per expert into a parameter of three dimensions."""
_ROWS = ("Concatenate 0",)
"""Conversion of several matrices into one, rows after rows."""
_TRANSPOSED = ("Transpose 1 2",)


@dataclass(frozen=True)
class Region:
    """The rows of a parameter that one stored tensor holds.

    Rows count through the matrices of a parameter, [experts · rows, columns].
    """

    first_row: int
    num_rows: int
    is_transposed: bool = False
    """Whether the files hold each matrix transposed; such a tensor holds all of them."""


@dataclass(frozen=True)
class ParameterLayout:
    """How files hold one parameter."""

    shape: tuple[int, ...]
    """In memory: [experts, rows, columns], [rows, columns] or [rows]."""
    is_transposed: bool
    """Whether its class multiplies by its matrices from the right, [in, out]."""
    regions: Mapping[str, Region]
    """By stored name. Together they hold every row once."""

    @property
    def num_matrices(self) -> int:
        """Matrices of the parameter."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def num_rows(self) -> int:
        """Rows of all matrices."""
        return prod(self.shape) // self.columns


def find_layouts(
    name_map: NameMap, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ParameterLayout]:
    """Return how files hold each parameter, by canonical name.

    Left out are parameters whose conversion is another one, and those that the files hold in part.

    Args:
        name_map: of the checkpoint.
        shapes: of the tensors in its files.
    """
    layouts = {}
    for canonical, places in name_map.by_parameter().items():
        parameter = name_map.parameters.get(canonical)
        if parameter is None:
            continue
        regions = _find_regions(
            {name: shapes[name] for name in places.values()}, name_map, parameter.shape
        )
        if regions is not None:
            layouts[canonical] = ParameterLayout(parameter.shape, parameter.is_transposed, regions)
    return layouts


def _find_regions(
    shapes: Mapping[str, tuple[int, ...]], name_map: NameMap, parameter: tuple[int, ...]
) -> dict[str, Region] | None:
    """Return the rows of each tensor of one parameter, None where they are not understood."""
    total = prod(parameter[:-1]) if len(parameter) > 1 else prod(parameter)
    conversions = {
        name: name_map.conversions[name] for name in shapes if name in name_map.conversions
    }
    if len(shapes) == 1:
        name, shape = next(iter(shapes.items()))
        is_converted = parameter_of(name_map.canonical[name]) != name_map.canonical[name]
        return _find_whole(name, shape, parameter, conversions.get(name), is_converted=is_converted)
    if len(conversions) != len(shapes) or len({item.steps for item in conversions.values()}) != 1:
        return None
    steps = next(iter(conversions.values())).steps
    if steps not in (*_STACKS, _ROWS) or (steps in _STACKS) != (len(parameter) == 3):
        return None
    regions = {}
    next_row = 0
    order = sorted(
        shapes, key=lambda name: (conversions[name].index or 0, conversions[name].position)
    )
    for name in order:
        rows = shapes[name][0]
        if shapes[name][1:] != parameter[len(parameter) - len(shapes[name]) + 1 :]:
            return None
        regions[name] = Region(next_row, rows)
        next_row += rows
    places = [(conversions[name].index, conversions[name].position) for name in order]
    is_complete = next_row == total and len(set(places)) == len(places)
    if steps in _STACKS:
        is_complete &= {index for index, _ in places} == set(range(parameter[0]))
        starts = {conversions[name].index: regions[name].first_row for name in reversed(order)}
        matrix_rows = parameter[1]
        is_complete &= all(row == (index or 0) * matrix_rows for index, row in starts.items())
    return regions if is_complete else None


def _find_whole(
    name: str,
    shape: tuple[int, ...],
    parameter: tuple[int, ...],
    conversion: Conversion | None,
    *,
    is_converted: bool,
) -> dict[str, Region] | None:
    """Return the rows of a tensor that is a whole parameter, None where they are not understood."""
    total = prod(parameter[:-1]) if len(parameter) > 1 else prod(parameter)
    if not is_converted:
        return {name: Region(0, total)} if shape == parameter else None
    if conversion is None or conversion.steps != _TRANSPOSED or len(parameter) != 3:
        return None
    if conversion.compares_shapes and shape == parameter:
        return {name: Region(0, total)}
    if shape != (parameter[0], parameter[2], parameter[1]):
        return None
    return {name: Region(0, total, is_transposed=True)}
