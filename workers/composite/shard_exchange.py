"""Exchange of tensors between ranks: one rank reads each item, cuts it and scatters the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch

from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan, TensorPart
from mmerge.workers.composite.weight_items import Field, Item
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows, unpack_rows

LINE_BYTES = 64
"""Fields of an item share one buffer; each begins on a cache line."""


def assign_ranks(sizes: Sequence[int], *, num_ranks: int, loads: Sequence[int] = ()) -> list[int]:
    """Return a rank for each size, so that the sums per rank are nearly equal.

    The largest size comes first, each goes to the rank with the least. `loads` are the bytes that
    the ranks have already; 0 if absent.
    """
    totals = list(loads) or [0] * num_ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owner = min(range(num_ranks), key=lambda rank: (totals[rank], rank))
        owners[index] = owner
        totals[owner] += sizes[index]
    return owners


def scatter_item(
    item: Item,
    tensors: Iterator[Mapping[str, torch.Tensor]],
    *,
    group: ProcessGroup,
    owner: int,
    plan: TensorParallelPlan,
) -> dict[str, torch.Tensor]:
    """Return this rank's part of each field of an item.

    Every rank calls this for the same items in the same order.

    Args:
        item: the item.
        tensors: whole fields of the items that this rank owns, in order.
        group: the ranks.
        owner: the rank that read this item.
        plan: how tensors are divided.
    """
    if group.num_ranks == 1:
        return dict(next(tensors))
    shape = item.fields[0].shape
    is_vector = len(shape) == 1
    parts = [plan.part_of(item.name, shape, rank=rank) for rank in range(group.num_ranks)]
    # A generator: beside the prefetched items only the whole item and one part are in memory.
    messages = None
    if owner == group.rank:
        messages = _pack_parts(item, next(tensors), parts, is_vector=is_vector)
    shapes = [part_shape(field, parts[group.rank], is_vector=is_vector) for field in item.fields]
    sizes = [
        prod(shape) * field.dtype.itemsize for field, shape in zip(item.fields, shapes, strict=True)
    ]
    received = group.scatter(messages, source=owner, num_bytes=sum(map(_padded, sizes)))
    fields, start = {}, 0
    for field, shape, size in zip(item.fields, shapes, sizes, strict=True):
        fields[field.name] = received[start : start + size].view(field.dtype).reshape(shape)
        start += _padded(size)
    return fields


def cut(value: torch.Tensor, field: Field, part: TensorPart, *, is_vector: bool) -> torch.Tensor:
    """Return a rank's part of a field, contiguous, zero-padded to the size of the part."""
    if part.along == "whole":
        return value.contiguous()
    if field.name == "masks" and part.along == "columns":
        return _cut_mask_columns(value, part)
    dim = -1 if is_vector or part.along == "columns" else -2
    pieces = [value.narrow(dim, start, stop - start) for start, stop in part.ranges]
    piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
    if piece.shape[dim] < part.size:
        missing = [*piece.shape]
        missing[dim] = part.size - piece.shape[dim]
        piece = torch.cat([piece, piece.new_zeros(missing)], dim=dim)
    return piece.contiguous()


def _cut_mask_columns(masks: torch.Tensor, part: TensorPart) -> torch.Tensor:
    """Return some columns of packed masks [experts, rows, bytes], packed again by rows."""
    ((start, stop),) = part.ranges
    if start % 8 == 0 and part.size % 8 == 0:
        return masks[..., start // 8 : stop // 8].contiguous()
    width = masks.shape[-1] * 8
    columns = [unpack_rows(mask, width)[:, start:stop] for mask in masks]
    return torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in columns])


def part_shape(field: Field, part: TensorPart, *, is_vector: bool) -> tuple[int, ...]:
    """Return the shape of what `cut` returns."""
    if part.along == "whole":
        return field.shape
    shape = list(field.shape)
    if field.name == "masks" and part.along == "columns":
        shape[-1] = -(-part.size // 8)
    else:
        shape[-1 if is_vector or part.along == "columns" else -2] = part.size
    return tuple(shape)


def _pack_parts(
    item: Item,
    tensors: Mapping[str, torch.Tensor],
    parts: Sequence[TensorPart],
    *,
    is_vector: bool,
) -> Iterator[torch.Tensor]:
    """Yield each rank's part of all fields in one buffer, uint8 [bytes]."""
    for part in parts:
        pieces = [
            cut(tensors[field.name], field, part, is_vector=is_vector) for field in item.fields
        ]
        yield torch.cat([_to_padded_bytes(piece) for piece in pieces])


def _padded(num_bytes: int) -> int:
    """Return the bytes that a field takes in the shared buffer."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


def _to_padded_bytes(value: torch.Tensor) -> torch.Tensor:
    raw = value.reshape(-1).view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, _padded(len(raw)) - len(raw)))
