"""Tensors of another layout than that of the files: stacks, slices and transposes, as pure data.

Mixtures of experts are stored as one matrix per expert, or as one tensor of all, possibly
transposed. Slices are byte ranges; the others are formed block by block when they are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

from typing_extensions import override

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, TensorSpec
from mmerge.workers.checkpoints.formed_sources import BlockScaledSource
from mmerge.workers.checkpoints.sources import FormedSource, TensorSource


@dataclass(frozen=True)
class StackedSource(FormedSource):
    """Rows of several matrices, one matrix after the other.

    `uri` and `file` are those of the first.
    """

    parts: tuple[TensorSource, ...]
    """[rows, columns] each, of equal columns and dtype."""

    def to_rows(self, row_start: int, row_stop: int) -> TensorSource:
        """Return the source of rows `row_start` to `row_stop` of the first dimension."""
        scale = prod(self.spec.shape[1:]) // self.parts[0].spec.shape[1]
        return stack_rows(
            slice_rows(self.parts, row_start * scale, row_stop * scale),
            name=self.spec.name,
            shape=(row_stop - row_start, *self.spec.shape[1:]),
        )

    @property
    @override
    def inputs(self) -> tuple[TensorSource, ...]:
        return self.parts

    @property
    @override
    def settings(self) -> tuple[Any, ...]:
        return ("stacked",)

    @property
    @override
    def kept_bytes(self) -> int:
        return 0


@dataclass(frozen=True)
class TransposedSource(FormedSource):
    """Rows of the transposes of a stack of matrices.

    `uri` and `file` are those of the stack.
    """

    stack: TensorSource
    """[matrices, rows, columns], whole."""
    first_row: int = 0
    """Position of the first row of this source in the transposed stack, laid out as one matrix."""

    def to_rows(self, row_start: int, row_stop: int) -> TransposedSource:
        """Return the source of rows `row_start` to `row_stop` of the first dimension."""
        return replace(
            self,
            spec=TensorSource.to_rows(self, row_start, row_stop).spec,
            first_row=self.first_row + row_start * (prod(self.spec.shape[1:]) // self.row_entries),
        )

    @property
    @override
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.stack,)

    @property
    @override
    def settings(self) -> tuple[Any, ...]:
        return ("transposed", list(self.stack.spec.shape), self.first_row, list(self.spec.shape))

    @property
    @override
    def kept_bytes(self) -> int:
        """One matrix as it is read, and transposed."""
        return 2 * self.stack.spec.num_bytes // self.stack.spec.shape[0]

    @property
    @override
    def row_entries(self) -> int:
        return self.stack.spec.shape[1]


def with_shape(source: TensorSource, shape: tuple[int, ...]) -> TensorSource:
    """Return the same entries in another shape that keeps the rows of matrices.

    Raises:
        CheckpointError: the tensor is formed in a way that depends on its shape.
    """
    spec = replace(source.spec, shape=shape)
    if isinstance(source, BlockScaledSource):
        return replace(source, spec=spec, weights=with_shape(source.weights, shape))
    if isinstance(source, (TransposedSource, StackedSource)) or not isinstance(
        source, FormedSource
    ):
        return replace(source, spec=spec)
    raise CheckpointError(
        f"{source.spec.name}: is formed from an adapter, and cannot be read in another layout of"
        " experts. Merge the adapter first (PEFT: merge_and_unload, save_pretrained)"
    )


def slice_rows(parts: Sequence[TensorSource], start: int, stop: int) -> list[TensorSource]:
    """Return rows `start` to `stop` of matrices that lie one after the other."""
    ends = list(accumulate(part.spec.shape[0] for part in parts))
    sliced = []
    index = bisect_right(ends, start)
    while start < stop:
        part = parts[index]
        first = ends[index] - part.spec.shape[0]
        part_stop = min(stop, ends[index])
        is_whole = (start, part_stop) == (first, ends[index])
        sliced.append(part if is_whole else part.to_rows(start - first, part_stop - first))
        start = part_stop
        index += 1
    return sliced


def stack_rows(parts: Sequence[TensorSource], *, name: str, shape: tuple[int, ...]) -> TensorSource:
    """Return matrices one after the other as one tensor of a shape; a single one as it is.

    Raises:
        CheckpointError: they differ in dtype.
    """
    if len(parts) == 1:
        return with_shape(parts[0], shape)
    dtypes = sorted({part.spec.dtype for part in parts})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{name}: its parts {parts[0].spec.name}, … are of {' and '.join(dtypes)}, and are one"
            " tensor in the base. Save the checkpoint in one dtype"
        )
    num_bytes = prod(shape) * DTYPE_BYTES[dtypes[0]]
    spec = TensorSpec(name, dtypes[0], shape, 0, num_bytes)
    return StackedSource(parts[0].uri, parts[0].file, spec, parts=tuple(parts))


def transpose_matrices(source: TensorSource) -> TensorSource:
    """Return the transposes of a stack of matrices, [matrices, columns, rows]."""
    matrices, rows, columns = source.spec.shape
    spec = replace(source.spec, shape=(matrices, columns, rows), offset=0)
    return TransposedSource(source.uri, source.file, spec, stack=source)
