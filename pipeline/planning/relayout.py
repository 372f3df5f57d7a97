"""Experts whose files hold mixtures of experts in another layout than the base's.

The base's layout is that of the build: an expert's matrices are sliced, stacked and transposed
when they are read, as transformers does when it loads the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod

from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.relaid_sources import (
    slice_rows,
    stack_rows,
    transpose_matrices,
    with_shape,
)
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.families.fused_parameters import ParameterLayout, Region, find_layouts
from mmerge.workers.families.name_map import NameMap


class RelaidCheckpoint(Checkpoint):
    """An expert whose tensors are read in the base's layout."""

    def __init__(self, expert: Checkpoint, tensors: Mapping[str, TensorSource]) -> None:
        """Take everything but the tensors from `expert`."""
        self.uri, self.owner, self.config = expert.uri, expert.owner, expert.config
        self._store = expert._store
        self._expert = expert
        self._relaid = dict(sorted(tensors.items()))

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors, by the names that the expert's files would have for the base's layout."""
        return self._relaid

    @property
    @override
    def identity(self) -> dict[str, str]:
        """See Checkpoint."""
        return self._expert.identity

    @override
    def read_small_files(self) -> dict[str, bytes]:
        """See Checkpoint."""
        return self._expert.read_small_files()


def find_other_layouts(
    base: Checkpoint, expert: Checkpoint, *, base_map: NameMap, expert_map: NameMap
) -> dict[str, tuple[ParameterLayout, ParameterLayout]]:
    """Return both layouts of every parameter that the expert's files hold otherwise.

    Raises:
        CheckpointError, ShapeMismatch: a layout is not understood, or the parameters differ.
    """
    ours, theirs = base_map.by_parameter(), expert_map.by_parameter()
    base_shapes = {name: source.spec.shape for name, source in base.tensors.items()}
    expert_shapes = {name: source.spec.shape for name, source in expert.tensors.items()}
    differing = []
    for parameter in sorted(set(ours) & set(theirs)):
        common = set(ours[parameter]) & set(theirs[parameter])
        is_equal = len(common) == len(ours[parameter]) == len(theirs[parameter])
        is_stack = len(ours[parameter]) > 1 or len(base_shapes[min(ours[parameter].values())]) == 3
        has_other_shape = is_stack and any(
            base_shapes[ours[parameter][place]] != expert_shapes[theirs[parameter][place]]
            for place in common
        )
        if not is_equal or has_other_shape:
            differing.append(parameter)
    if not differing:
        return {}
    base_layouts = find_layouts(base_map, base_shapes)
    expert_layouts = find_layouts(expert_map, expert_shapes)
    layouts = {}
    for parameter in differing:
        pair = base_layouts.get(parameter), expert_layouts.get(parameter)
        name, expert_name = min(ours[parameter].values()), min(theirs[parameter].values())
        classes = f"({expert_map.class_name}, {base_map.class_name})"
        if pair[0] is None or pair[1] is None:
            raise CheckpointError(
                f"{expert.owner}: {expert.uri} holds {expert_name} where the base holds {name}:"
                f" both are parts of one parameter in memory, in different layouts {classes}, and"
                " one of them is unknown or incomplete. Save both with save_pretrained of one class"
            )
        if pair[0].shape != pair[1].shape or pair[0].is_transposed != pair[1].is_transposed:
            raise ShapeMismatch(
                f"{name}: {expert.owner} has {pair[1].shape} in memory ({expert_name}), the base"
                f" has {pair[0].shape} {classes}. Experts must be tuned from the base"
            )
        layouts[parameter] = (pair[0], pair[1])
    return layouts


def read_region(
    region: Region, layout: ParameterLayout, expert: Checkpoint, *, name: str
) -> TensorSource:
    """Return the rows of a parameter that a tensor of the base holds, from an expert's files.

    Args:
        region: the rows, in the layout of the base.
        layout: how the expert's files hold the parameter.
        expert: the expert.
        name: of the tensor that is formed.

    Raises:
        CheckpointError: parts of it differ in dtype.
    """
    num_matrices, columns = layout.num_matrices, layout.columns
    matrices = []
    for stored, held in sorted(layout.regions.items(), key=lambda item: item[1].first_row):
        source = expert.tensors[stored]
        if held.is_transposed and region.is_transposed:
            return source
        plain = transpose_matrices(source) if held.is_transposed else source
        matrices.append(with_shape(plain, (held.num_rows, columns)))
    rows = slice_rows(matrices, region.first_row, region.first_row + region.num_rows)
    if region.is_transposed:
        matrix_rows = region.num_rows // num_matrices
        stack = stack_rows(rows, name=name, shape=(num_matrices, matrix_rows, columns))
        return transpose_matrices(stack)
    return stack_rows(rows, name=name, shape=(region.num_rows, columns))


def to_shape(source: TensorSource, shape: tuple[int, ...]) -> TensorSource:
    """Return a formed tensor in the shape that the base's has. Raises ShapeMismatch."""
    if prod(source.spec.shape) != prod(shape):
        raise ShapeMismatch(f"{source.spec.name}: has {source.spec.shape}, the base has {shape}")
    return with_shape(source, shape)
