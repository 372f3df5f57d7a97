"""Bytes of tensor sources: read from a store, or computed from several stored tensors."""

from __future__ import annotations

import torch

from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.dtypes import to_bytes, to_tensor
from mmerge.workers.checkpoints.lora_weights import low_rank_rows
from mmerge.workers.checkpoints.sources import (
    BlockScaledSource,
    LowRankSource,
    OpenStores,
    TensorSource,
)

COMPARED_BYTES = 4 << 20
"""Bytes of each tensor that are compared at once."""


def read_source(
    source: TensorSource, *, stores: dict[str, ReadableStore], offset: int, num_bytes: int
) -> memoryview:
    """Return `num_bytes` bytes of a tensor, from `offset` bytes after its start.

    A store that is missing in `stores` is opened and added.

    Raises:
        NotFound, StoreError: the file is missing or shorter than its header says.
    """
    if isinstance(source, LowRankSource):
        return read_low_rank(source, stores, start=offset // 4, stop=(offset + num_bytes) // 4)
    if isinstance(source, BlockScaledSource):
        return read_block_scaled(source, stores, start=offset // 4, stop=(offset + num_bytes) // 4)
    store = stores.get(source.uri)
    if store is None:
        store = stores[source.uri] = open_readable_store(source.uri)
    tensor_start = source.spec.offset
    return store.read_forward(
        source.file,
        offset=tensor_start + offset,
        num_bytes=num_bytes,
        start=tensor_start,
        stop=tensor_start + source.spec.num_bytes,
    )


def has_equal_bytes(first: TensorSource, second: TensorSource, *, stores: OpenStores) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes; reads both in pieces."""
    if (first.spec.dtype, first.spec.shape) != (second.spec.dtype, second.spec.shape):
        return False
    # A store reads one range of a file forward at a time. Two ranges in turn would drop what was
    # prefetched for the other, and request it again.
    is_same_file = (first.uri, first.file) == (second.uri, second.file)
    second_stores = OpenStores() if is_same_file else stores
    num_bytes = first.spec.num_bytes
    for offset in range(0, num_bytes, COMPARED_BYTES):
        size = min(COMPARED_BYTES, num_bytes - offset)
        piece = read_source(first, stores=stores, offset=offset, num_bytes=size)
        if piece != read_source(second, stores=second_stores, offset=offset, num_bytes=size):
            return False
    return True


def read_low_rank(
    source: LowRankSource, stores: dict[str, ReadableStore], *, start: int, stop: int
) -> memoryview:
    """Return the bytes (float32) of entries `start` to `stop` of θ₀ + scale·B·A."""
    width = source.spec.shape[1]
    row_start, row_stop = start // width, -(-stop // width)
    factors = [_read_factor(factor, stores) for factor in (source.a, source.b)]
    product = low_rank_rows(
        factors[0],
        factors[1],
        scale=source.scale,
        row_start=source.first_row + row_start,
        row_stop=source.first_row + row_stop,
    )
    entry_bytes = source.base.spec.num_bytes // source.base.spec.num_entries
    data = read_source(
        source.base,
        stores=stores,
        offset=start * entry_bytes,
        num_bytes=(stop - start) * entry_bytes,
    )
    base = to_tensor(data, source.base.spec.dtype).to(torch.float32)
    first = row_start * width
    return to_bytes(base + product.reshape(-1)[start - first : stop - first])


def read_block_scaled(
    source: BlockScaledSource, stores: dict[str, ReadableStore], *, start: int, stop: int
) -> memoryview:
    """Return the bytes (float32) of entries `start` to `stop` of scaled float8 weights.

    Each entry is multiplied on its own, so the bits do not depend on how the entries are asked for.
    """
    width = source.spec.shape[-1]
    row_start, row_stop = start // width, -(-stop // width)
    block_rows, block_columns = source.block
    rows = torch.arange(source.first_row + row_start, source.first_row + row_stop)
    grid_rows = -(-source.matrix_rows // block_rows)
    grid_row = rows // source.matrix_rows * grid_rows + rows % source.matrix_rows // block_rows
    scales = _read_factor(source.scales, stores).reshape(-1, -(-width // block_columns))
    per_entry = scales[grid_row].repeat_interleave(block_columns, dim=1)[:, :width].reshape(-1)
    data = read_source(source.weights, stores=stores, offset=start, num_bytes=stop - start)
    values = to_tensor(data, source.weights.spec.dtype).to(torch.float32)
    return to_bytes(values * per_entry[start - row_start * width : stop - row_start * width])


def _read_factor(source: TensorSource, stores: dict[str, ReadableStore]) -> torch.Tensor:
    """Return a factor or the scales as float32; `OpenStores` keeps them for the next block."""
    cache = stores.factors if isinstance(stores, OpenStores) else {}
    if source not in cache:
        data = read_source(source, stores=stores, offset=0, num_bytes=source.spec.num_bytes)
        values = to_tensor(data, source.spec.dtype).to(torch.float32)
        cache[source] = values.reshape(source.spec.shape)
    factor: torch.Tensor = cache[source]
    return factor
