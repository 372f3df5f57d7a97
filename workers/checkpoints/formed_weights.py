"""Weights that are formed where a task reads them: adapted, dequantised, with replaced rows."""

from __future__ import annotations

from bisect import bisect_right
from math import prod

import numpy as np
import torch

from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.dtypes import to_bytes, to_tensor
from mmerge.workers.checkpoints.formed_sources import (
    BlockScaledSource,
    GatheredSource,
    LowRankSource,
    ReplacedRowsSource,
    RowRun,
)
from mmerge.workers.checkpoints.lora_weights import low_rank_rows
from mmerge.workers.checkpoints.relaid_sources import StackedSource, TransposedSource
from mmerge.workers.checkpoints.relaid_weights import read_relaid
from mmerge.workers.checkpoints.sources import (
    FormedSource,
    OpenStores,
    ReadSource,
    TensorSource,
)


def read_formed(
    source: FormedSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    """Return the bytes of entries `start` to `stop` of a tensor that no file holds.

    `read` reads what the tensor is formed from, which may itself be formed: a LoRA adapter over
    scaled float8 weights.
    """
    if isinstance(source, LowRankSource):
        form = _form_dora if source.magnitude is not None else _form_low_rank
        return to_bytes(form(source, stores, read=read, start=start, stop=stop))
    if isinstance(source, ReplacedRowsSource):
        return to_bytes(_form_replaced(source, stores, read=read, start=start, stop=stop))
    if isinstance(source, GatheredSource):
        return _read_gathered(source, stores, read=read, start=start, stop=stop)
    if isinstance(source, BlockScaledSource):
        return _read_block_scaled(source, stores, read=read, start=start, stop=stop)
    if isinstance(source, (StackedSource, TransposedSource)):
        return read_relaid(source, stores, read=read, start=start, stop=stop)
    raise TypeError(f"{source.spec.name}: no reader for {type(source).__name__}")


def _form_low_rank(
    source: LowRankSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return entries `start` to `stop` of θ₀ + scale·B·A, float32."""
    width = source.row_entries
    row_start, row_stop = start // width, -(-stop // width)
    first = source.first_row
    product = _product_rows(
        source, stores, read=read, start=first + row_start, stop=first + row_stop
    )
    base = _read_values(source.base, stores, read=read, start=start, stop=stop)
    offset = row_start * width
    return base + product.reshape(-1)[start - offset : stop - offset]


def _form_dora(
    source: LowRankSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return entries `start` to `stop` of m·V/‖V‖ with V = θ₀ + scale·B·A, float32.

    ‖V‖ is that of each row, so whole rows are formed. DoRA (arXiv 2402.09353), equation 5; the
    norm counts all entries behind the first dimension, as PEFT does for convolutions.
    """
    assert source.magnitude is not None
    width = source.row_entries
    row_start, row_stop = start // width, -(-stop // width)
    rows = []
    kept = stores.last_rows.get(source) if isinstance(stores, OpenStores) else None
    first = row_start
    if kept is not None and kept[0] == row_start:
        rows.append(kept[1].reshape(1, width))
        first += 1
    if first < row_stop:
        values = _form_low_rank(
            source, stores, read=read, start=first * width, stop=row_stop * width
        ).reshape(-1, width)
        magnitudes = _read_factor(source.magnitude, stores, read).reshape(-1)
        positions = slice(source.first_row + first, source.first_row + row_stop)
        rows.append(values * (magnitudes[positions] / _row_norms(values))[:, None])
    if isinstance(stores, OpenStores):
        stores.last_rows[source] = (row_stop - 1, rows[-1][-1].clone())
    offset = row_start * width
    return torch.cat(rows).reshape(-1)[start - offset : stop - offset]


def _row_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of each row, float32 [rows].

    Summed by numpy in float64, row by row: torch sums a single row with several threads, so that
    its bits would depend on the number of rows and of threads.
    """
    norms = [np.sqrt(np.square(row, dtype=np.float64).sum()) for row in values.numpy()]
    return torch.from_numpy(np.array(norms, np.float32))


def _product_rows(
    source: LowRankSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return rows `start` to `stop` of scale·B·A, float32 [rows, width].

    Rows count through the matrices of a stack. Their bits do not depend on the range.
    """
    a, b = (_read_factor(factor, stores, read).flatten(1) for factor in (source.a, source.b))
    rank = len(a) // source.num_matrices
    stacked_b = b.reshape(len(b), rank, source.num_matrices)
    rows = []
    while start < stop:
        matrix, row = divmod(start, source.matrix_rows)
        row_stop = min(source.matrix_rows, row + stop - start)
        right, left = a, b
        if source.num_matrices > 1:
            right = a[matrix * rank : (matrix + 1) * rank]
            left = stacked_b[:, :, matrix].contiguous()
        if source.is_transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        rows.append(
            low_rank_rows(right, left, scale=source.scale, row_start=row, row_stop=row_stop)
        )
        start += row_stop - row
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _form_replaced(
    source: ReplacedRowsSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return entries `start` to `stop` of a matrix with some rows replaced, float32."""
    width = source.row_entries
    values = _read_values(source.base, stores, read=read, start=start, stop=stop).clone()
    rows = _read_factor(source.rows, stores, read)
    for index, row in zip(source.indices, rows, strict=True):
        first = (index - source.first_row) * width
        low, high = max(first, start), min(first + width, stop)
        if low < high:
            values[low - start : high - start] = row[low - first : high - first]
    return values


def _read_values(
    source: TensorSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return entries `start` to `stop` of a tensor as float32."""
    entry_bytes = source.spec.num_bytes // source.spec.num_entries
    data = read(
        source,
        stores=stores,
        offset=start * entry_bytes,
        num_bytes=(stop - start) * entry_bytes,
    )
    return to_tensor(data, source.spec.dtype).to(torch.float32)


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


def _read_gathered(
    source: GatheredSource,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> memoryview:
    """Return the bytes of entries `start` to `stop` of a table of gathered rows.

    Each entry follows from its own terms, so the bits do not depend on how entries are asked for.
    """
    width = prod(source.spec.shape[1:])
    data = bytearray((stop - start) * DTYPE_BYTES[source.spec.dtype])
    position = 0
    index = bisect_right(source.run_starts, start // width) - 1
    entry = start
    while entry < stop:
        run, run_start = source.runs[index], source.run_starts[index] * width
        last = min(stop, run_start + run.num_rows * width)
        part = _read_run(
            source, run, stores, read=read, start=entry - run_start, stop=last - run_start
        )
        data[position : position + len(part)] = part
        position += len(part)
        entry = last
        index += 1
    return memoryview(data)


def _read_run(
    source: GatheredSource,
    run: RowRun,
    stores: dict[str, ReadableStore],
    *,
    read: ReadSource,
    start: int,
    stop: int,
) -> bytes | memoryview:
    """Return the bytes of entries `start` to `stop` of one run."""
    dtype = source.spec.dtype
    if not run.terms:
        return bytes((stop - start) * DTYPE_BYTES[dtype])
    width = prod(source.spec.shape[1:])
    total: torch.Tensor | None = None
    for index, row in run.terms:
        table = source.tables[index]
        entry_bytes = DTYPE_BYTES[table.spec.dtype]
        data = read(
            table,
            stores=stores,
            offset=(row * width + start) * entry_bytes,
            num_bytes=(stop - start) * entry_bytes,
        )
        if len(run.terms) == 1 and table.spec.dtype == dtype:
            return data
        values = to_tensor(data, table.spec.dtype).to(torch.float32)
        total = values if total is None else total + values
    assert total is not None
    return to_bytes(total / len(run.terms))


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
