"""Tensors that no file holds, as pure data: adapted, dequantised, with replaced or other rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

from typing_extensions import override

from mmerge.manifests.format.safetensors_header import TensorSpec
from mmerge.workers.checkpoints.sources import FormedSource, TensorSource


def make_formed_spec(spec: TensorSpec) -> TensorSpec:
    """Return the description of a tensor of the same name and shape, formed as float32."""
    return TensorSpec(spec.name, "F32", spec.shape, 0, 4 * spec.num_entries)


@dataclass(frozen=True)
class LowRankSource(FormedSource):
    """Weights with a LoRA adapter: θ₀ + scale·B·A, float32, computed when read.

    `uri` and `file` are the adapter's. Tensors of more than two dimensions are convolutions, whose
    weights are [out, in·height·width] to an adapter, or stacks of matrices.
    """

    base: TensorSource
    """The same rows of the base's weights."""
    a: TensorSource
    """[rank, in]; of a stack [matrices·rank, in], matrix by matrix."""
    b: TensorSource
    """[out, rank], all rows of the matrix; of a stack [out, rank·matrices], rank by rank."""
    scale: float
    first_row: int = 0
    """Position in the matrix, or in the stack as one matrix, of the first row of this source."""
    magnitude: TensorSource | None = None
    """Norm of each row of the whole matrix, to which rows are scaled (DoRA); None without."""
    num_matrices: int = 1
    """Matrices in the stack that the adapter was trained for."""
    is_transposed: bool = False
    """Whether (scale·B·A)ᵀ is added to each matrix: embeddings, and stacks [..., in, out]."""

    def to_rows(self, row_start: int, row_stop: int) -> LowRankSource:
        """Return the source of rows `row_start` to `row_stop` of the first dimension."""
        return replace(
            self,
            spec=TensorSource.to_rows(self, row_start, row_stop).spec,
            base=self.base.to_rows(row_start, row_stop),
            first_row=self.first_row + row_start * (prod(self.spec.shape[1:]) // self.row_entries),
        )

    @property
    @override
    def inputs(self) -> tuple[TensorSource, ...]:
        factors = (self.base, self.a, self.b)
        return factors if self.magnitude is None else (*factors, self.magnitude)

    @property
    @override
    def settings(self) -> tuple[Any, ...]:
        plain = (self.scale.hex(), self.first_row)
        if self.num_matrices == 1 and not self.is_transposed:
            return plain
        return (*plain, self.num_matrices, self.is_transposed)

    @property
    @override
    def kept_bytes(self) -> int:
        """Both factors as stored and widened to float32, one matrix's again, and a DoRA row."""
        parts = self.inputs[1:]
        copies = 4 if self.num_matrices == 1 and not self.is_transposed else 8
        factors = sum(part.spec.num_bytes + copies * part.spec.num_entries for part in parts)
        return factors + (0 if self.magnitude is None else 24 * self.row_entries)

    @property
    @override
    def row_entries(self) -> int:
        return self.b.spec.shape[0] if self.is_transposed else prod(self.a.spec.shape[1:])

    @property
    def matrix_rows(self) -> int:
        """Rows of each matrix."""
        return prod(self.a.spec.shape[1:]) if self.is_transposed else self.b.spec.shape[0]


@dataclass(frozen=True)
class ReplacedRowsSource(FormedSource):
    """A matrix with some rows replaced by an adapter's, float32, formed when read.

    `uri` and `file` are the adapter's.
    """

    base: TensorSource
    """The same rows of the matrix before."""
    rows: TensorSource
    """All rows that replace others."""
    indices: tuple[int, ...]
    """The row of the whole matrix that each replaces."""
    first_row: int = 0
    """Position in the matrix of the first row of this source."""

    def to_rows(self, row_start: int, row_stop: int) -> ReplacedRowsSource:
        """Return the source of rows `row_start` to `row_stop`."""
        return replace(
            self,
            spec=TensorSource.to_rows(self, row_start, row_stop).spec,
            base=self.base.to_rows(row_start, row_stop),
            first_row=self.first_row + row_start,
        )

    @property
    @override
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.base, self.rows)

    @property
    @override
    def settings(self) -> tuple[Any, ...]:
        return ("replaced rows", list(self.indices), self.first_row)

    @property
    @override
    def kept_bytes(self) -> int:
        return self.rows.spec.num_bytes + 4 * self.rows.spec.num_entries


@dataclass(frozen=True)
class BlockScaledSource(FormedSource):
    """Weights stored as float8 with scales: float8 · scale, float32, computed when read.

    `uri` and `file` are those of the float8 weights.
    """

    weights: TensorSource
    """The same rows as float8, [..., rows, columns]."""
    scales: TensorSource
    """One per block of the whole tensor: float of any width, in C order."""
    block: tuple[int, int]
    """Rows and columns that share a scale; blocks at the edges may be smaller."""
    matrix_rows: int
    """Rows of one matrix in a stack of matrices; blocks do not cross matrices."""
    first_row: int = 0
    """Position of the first row of this source in the stack, laid out as one matrix."""

    def to_rows(self, row_start: int, row_stop: int) -> BlockScaledSource:
        """Return the source of rows `row_start` to `row_stop` of the first dimension."""
        return replace(
            self,
            spec=TensorSource.to_rows(self, row_start, row_stop).spec,
            weights=self.weights.to_rows(row_start, row_stop),
            first_row=self.first_row + row_start * prod(self.spec.shape[1:-1]),
        )

    @property
    @override
    def inputs(self) -> tuple[TensorSource, ...]:
        return (self.weights, self.scales)

    @property
    @override
    def settings(self) -> tuple[Any, ...]:
        return (list(self.block), self.matrix_rows, self.first_row)

    @property
    @override
    def kept_bytes(self) -> int:
        """The scales as stored, and widened to float32."""
        return self.scales.spec.num_bytes + 4 * self.scales.spec.num_entries


@dataclass(frozen=True)
class RowRun:
    """Successive rows of a gathered table, each the mean of as many rows of stored tables.

    A run of one term copies rows; one without terms is zero.
    """

    num_rows: int
    terms: tuple[tuple[int, int], ...]
    """(Table, its row for the first row of the run): the next rows are those that follow."""

    def to_rows(self, row_start: int, row_stop: int) -> RowRun:
        """Return the run of some of its rows."""
        terms = tuple((table, row + row_start) for table, row in self.terms)
        return RowRun(row_stop - row_start, terms)


@dataclass(frozen=True)
class GatheredSource(FormedSource):
    """A table whose rows are those of other tables in another order, formed when read.

    It has the tables' dtype if all have one and no row is a mean, else float32. `uri` and `file`
    are those of the first table.
    """

    tables: tuple[TensorSource, ...]
    """Whole tables of equally long rows."""
    runs: tuple[RowRun, ...]
    """They cover the rows in order."""

    @cached_property
    def run_starts(self) -> tuple[int, ...]:
        """The first row of every run."""
        starts = accumulate((run.num_rows for run in self.runs), initial=0)
        return tuple(starts)[:-1]

    def to_rows(self, row_start: int, row_stop: int) -> GatheredSource:
        """Return the source of rows `row_start` to `row_stop`."""
        runs = []
        first = 0
        for run in self.runs:
            start, stop = max(row_start, first), min(row_stop, first + run.num_rows)
            if start < stop:
                runs.append(run.to_rows(start - first, stop - first))
            first += run.num_rows
        spec = TensorSource.to_rows(self, row_start, row_stop).spec
        return replace(self, spec=spec, runs=tuple(runs))

    @property
    @override
    def inputs(self) -> tuple[TensorSource, ...]:
        return self.tables

    @property
    @override
    def settings(self) -> tuple[Any, ...]:
        runs = [[run.num_rows, run.terms] for run in self.runs]
        return ("gathered rows", self.spec.dtype, list(self.spec.shape), runs)

    @property
    @override
    def kept_bytes(self) -> int:
        return 0
