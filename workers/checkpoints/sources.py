"""Tensor sources: where the bytes of input tensors are, as pure data that tasks carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.format.safetensors_header import TensorSpec
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import prefetch_bytes


@dataclass(frozen=True)
class TensorSource:
    """Location of one tensor: checkpoint, file, byte range, dtype and shape."""

    uri: str
    file: str
    spec: TensorSpec

    def to_rows(self, row_start: int, row_stop: int) -> TensorSource:
        """Return the source of rows `row_start` to `row_stop` of the first dimension.

        A scalar counts as one row.
        """
        shape = self.spec.shape or (1,)
        row_bytes = self.spec.num_bytes // shape[0] if shape[0] else 0
        spec = TensorSpec(
            name=self.spec.name,
            dtype=self.spec.dtype,
            shape=(row_stop - row_start, *shape[1:]),
            offset=self.spec.offset + row_start * row_bytes,
            num_bytes=(row_stop - row_start) * row_bytes,
        )
        return TensorSource(self.uri, self.file, spec)


@dataclass(frozen=True)
class LowRankSource(TensorSource):
    """Weights of a Linear layer with a LoRA adapter: θ₀ + scale·B·A, float32, computed when read.

    `uri` and `file` are the adapter's. `spec` describes the computed rows as if they were stored as
    float32.
    """

    base: TensorSource
    """The same rows of the base's weights."""
    a: TensorSource
    """[rank, in]."""
    b: TensorSource
    """[out, rank], all rows of the matrix."""
    scale: float
    first_row: int = 0
    """Position in the matrix of the first row of this source."""

    def to_rows(self, row_start: int, row_stop: int) -> LowRankSource:
        """Return the source of rows `row_start` to `row_stop`."""
        return LowRankSource(
            uri=self.uri,
            file=self.file,
            spec=TensorSource.to_rows(self, row_start, row_stop).spec,
            base=self.base.to_rows(row_start, row_stop),
            a=self.a,
            b=self.b,
            scale=self.scale,
            first_row=self.first_row + row_start,
        )

    @property
    def factor_bytes(self) -> int:
        """Bytes that a task holds of both factors: as stored, and widened to float32."""
        return sum(
            factor.spec.num_bytes + 4 * factor.spec.num_entries for factor in (self.a, self.b)
        )


@dataclass(frozen=True)
class BlockScaledSource(TensorSource):
    """Weights stored as float8 with scales: float8 · scale, float32, computed when read.

    `uri` and `file` are those of the float8 weights. `spec` describes the computed rows as if they
    were stored as float32.
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
    def scale_bytes(self) -> int:
        """Bytes that a task holds of the scales: as stored, and widened to float32."""
        return self.scales.spec.num_bytes + 4 * self.scales.spec.num_entries


class OpenStores(dict[str, ReadableStore]):
    """Stores that a task has opened, by URI, and the factors and scales that it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: dict[TensorSource, Any] = {}
        """Float32 tensors; every block of a matrix needs all of A."""


def identity_digest(identities: dict[str, dict[str, str]], source: TensorSource) -> str:
    """Return a digest that stays equal until a file of the tensor is replaced.

    Args:
        identities: by URI and file, the store's identity of the file.
        source: the tensor.
    """
    if isinstance(source, LowRankSource):
        parts = [identity_digest(identities, part) for part in (source.base, source.a, source.b)]
        return digest_json([*parts, source.scale.hex(), source.first_row])
    if isinstance(source, BlockScaledSource):
        parts = [identity_digest(identities, part) for part in (source.weights, source.scales)]
        return digest_json([*parts, list(source.block), source.matrix_rows, source.first_row])
    identity = identities[source.uri]
    return digest_json(
        [source.uri, source.file, identity[source.file], source.spec.offset, source.spec.num_bytes]
    )


def total_prefetch_bytes(sources: Sequence[TensorSource]) -> int:
    """Return the most bytes that prefetching these tensors holds in memory; 0 for local files."""
    return sum(prefetch_bytes(uri) for uri in {source.uri for source in sources})
