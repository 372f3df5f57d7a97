"""Weights that are formed where a task reads them: LoRA products and scaled float8."""

from __future__ import annotations

from typing import Protocol

import torch

from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.dtypes import to_bytes, to_tensor
from mmerge.workers.checkpoints.lora_weights import low_rank_rows
from mmerge.workers.checkpoints.sources import (
    BlockScaledSource,
    LowRankSource,
    OpenStores,
    TensorSource,
)


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


def read_formed(
    source: LowRankSource | BlockScaledSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    """Return the bytes (float32) of entries `start` to `stop` of a tensor that no file holds.

    `read` reads what the tensor is formed from, which may itself be formed: a LoRA adapter over
    scaled float8 weights.
    """
    if isinstance(source, LowRankSource):
        return _read_low_rank(source, stores, read=read, start=start, stop=stop)
    return _read_block_scaled(source, stores, read=read, start=start, stop=stop)


def _read_low_rank(
    source: LowRankSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    """Return the bytes (float32) of entries `start` to `stop` of θ₀ + scale·B·A."""
    width = source.spec.shape[1]
    row_start, row_stop = start // width, -(-stop // width)
    factors = [_read_factor(factor, stores, read) for factor in (source.a, source.b)]
    product = low_rank_rows(
        factors[0],
        factors[1],
        scale=source.scale,
        row_start=source.first_row + row_start,
        row_stop=source.first_row + row_stop,
    )
    entry_bytes = source.base.spec.num_bytes // source.base.spec.num_entries
    data = read(
        source.base,
        stores=stores,
        offset=start * entry_bytes,
        num_bytes=(stop - start) * entry_bytes,
    )
    base = to_tensor(data, source.base.spec.dtype).to(torch.float32)
    first = row_start * width
    return to_bytes(base + product.reshape(-1)[start - first : stop - first])


def _read_block_scaled(
    source: BlockScaledSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
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
    scales = _read_factor(source.scales, stores, read).reshape(-1, -(-width // block_columns))
    per_entry = scales[grid_row].repeat_interleave(block_columns, dim=1)[:, :width].reshape(-1)
    data = read(source.weights, stores=stores, offset=start, num_bytes=stop - start)
    values = to_tensor(data, source.weights.spec.dtype).to(torch.float32)
    return to_bytes(values * per_entry[start - row_start * width : stop - row_start * width])


def _read_factor(
    source: TensorSource, stores: dict[str, ReadableStore], read: ReadSource
) -> torch.Tensor:
    """Return a factor or the scales as float32; `OpenStores` keeps them for the next block."""
    cache = stores.factors if isinstance(stores, OpenStores) else {}
    if source not in cache:
        data = read(source, stores=stores, offset=0, num_bytes=source.spec.num_bytes)
        values = to_tensor(data, source.spec.dtype).to(torch.float32)
        cache[source] = values.reshape(source.spec.shape)
    factor: torch.Tensor = cache[source]
    return factor
