"""Tensor sources: where the bytes of input tensors are, as pure data that tasks carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
class FormedSource(TensorSource):
    """A tensor that no file holds: it is computed from others when it is read.

    `spec` describes its rows as if they were stored. The kinds are in `formed_sources.py`.
    """

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        """The tensors that it is computed from, which may be formed themselves."""
        raise NotImplementedError

    @property
    def settings(self) -> tuple[Any, ...]:
        """All else that decides its values, as JSON."""
        raise NotImplementedError

    @property
    def kept_bytes(self) -> int:
        """Bytes that a task keeps while it reads the tensor, apart from the block in work."""
        raise NotImplementedError

    @property
    def row_entries(self) -> int:
        """Entries that can only be computed together: those of one row of a matrix."""
        return self.spec.shape[-1] if self.spec.shape else 1


class ReadSource(Protocol):
    """Reads a range of any tensor source: `reading.read_source`."""

    def __call__(
        self,
        source: TensorSource,
        *,
        stores: dict[str, ReadableStore],
        offset: int,
        num_bytes: int,
    ) -> memoryview:
        """Return `num_bytes` bytes from `offset` bytes after the tensor's start."""


class OpenStores(dict[str, ReadableStore]):
    """Stores that a task has opened, by URI, and what forming tensors reads more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: dict[TensorSource, Any] = {}
        """Float32 tensors; every block of a matrix needs all of A."""
        self.last_rows: dict[TensorSource, tuple[int, Any]] = {}
        """Number and values of the row or matrix in which the last block of a tensor ended.

        The next block begins in it. Its inputs have been read, and remote ones are read forward.
        """


def identity_digest(identities: dict[str, dict[str, str]], source: TensorSource) -> str:
    """Return a digest that stays equal until a file of the tensor is replaced.

    Args:
        identities: by URI and file, the store's identity of the file.
        source: the tensor.
    """
    if isinstance(source, FormedSource):
        parts = [identity_digest(identities, part) for part in source.inputs]
        return digest_json([*parts, *source.settings])
    identity = identities[source.uri]
    return digest_json(
        [source.uri, source.file, identity[source.file], source.spec.offset, source.spec.num_bytes]
    )


def total_prefetch_bytes(sources: Sequence[TensorSource]) -> int:
    """Return the most bytes that prefetching these tensors holds in memory; 0 for local files."""
    return sum(prefetch_bytes(uri) for uri in {source.uri for source in sources})
