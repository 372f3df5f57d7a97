"""Bytes of tensors in another layout than that of the files: stacks and transposes of matrices."""

from __future__ import annotations

from itertools import accumulate

import torch

from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.dtypes import to_bytes, to_tensor
from mmerge.workers.checkpoints.relaid_sources import StackedSource, TransposedSource
from mmerge.workers.checkpoints.sources import OpenStores, ReadSource, TensorSource


def read_relaid(
    source: StackedSource | TransposedSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    """Return the bytes of entries `start` to `stop`, in the dtype of the files."""
    if isinstance(source, StackedSource):
        return _read_stacked(source, stores, read=read, start=start, stop=stop)
    return _read_transposed(source, stores, read=read, start=start, stop=stop)


def _read_stacked(
    source: StackedSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    entry_bytes = DTYPE_BYTES[source.spec.dtype]
    ends = accumulate(part.spec.num_entries for part in source.parts)
    pieces = []
    for part, end in zip(source.parts, ends, strict=True):
        first = end - part.spec.num_entries
        low, high = max(start, first), min(stop, end)
        if low < high:
            data = read(
                part,
                stores=stores,
                offset=(low - first) * entry_bytes,
                num_bytes=(high - low) * entry_bytes,
            )
            pieces.append(data)
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


def _read_transposed(
    source: TransposedSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    _, width, height = source.stack.spec.shape
    matrix_entries = width * height
    position = source.first_row * width
    pieces = []
    first, last = start + position, stop + position
    while first < last:
        matrix, offset = divmod(first, matrix_entries)
        piece_stop = min(matrix_entries, offset + last - first)
        values = _read_matrix(source.stack, stores, read=read, matrix=matrix)
        pieces.append(values[offset:piece_stop])
        first += piece_stop - offset
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return to_bytes(values)


def _read_matrix(
    stack: TensorSource, stores: dict[str, ReadableStore], *, read: ReadSource, matrix: int
) -> torch.Tensor:
    """Return the entries of the transpose of one matrix; the last one is kept.

    The blocks of a matrix follow each other, and each of its rows lies all over the file's.
    """
    kept = stores.last_rows.get(stack) if isinstance(stores, OpenStores) else None
    if kept is not None and kept[0] == matrix:
        values: torch.Tensor = kept[1]
        return values
    _, rows, columns = stack.spec.shape
    num_bytes = rows * columns * DTYPE_BYTES[stack.spec.dtype]
    data = read(stack, stores=stores, offset=matrix * num_bytes, num_bytes=num_bytes)
    values = to_tensor(data, stack.spec.dtype).reshape(rows, columns).T.contiguous().reshape(-1)
    if isinstance(stores, OpenStores):
        stores.last_rows[stack] = (matrix, values)
    return values
