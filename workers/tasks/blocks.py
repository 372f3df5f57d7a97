"""Blocks of one tensor: which entries a method sees at once, read from base and experts and widened
to float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from mmerge.workers.checkpoints.block_reader import InputReader
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES, to_float_tensors
from mmerge.workers.methods.interface import Block, Granularity, Known
from mmerge.workers.task import TensorTask


def num_columns(shape: Sequence[int]) -> int:
    """Return the entries of one row: a tensor of less than two dimensions is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def entries_at_once(shape: Sequence[int], block_entries: int, *, granularity: Granularity) -> int:
    """Return how many entries of a tensor of this shape are in one block."""
    if granularity == "entry":
        return block_entries
    if granularity == "row":
        columns = max(num_columns(shape), 1)
        return max(block_entries // columns, 1) * columns
    return max(math.prod(shape), 1)


def read_blocks(
    tensor: TensorTask,
    reader: InputReader,
    *,
    thresholds: Sequence[float],
    known: Known,
    expert_names: tuple[str, ...],
    dtype: str,
    block_entries: int,
) -> Iterator[Block]:
    """Yield the blocks of a piece of a tensor in order."""
    shape = tensor.base.spec.shape
    columns, granularity = num_columns(shape), tensor.granularity
    at_once = entries_at_once(shape, block_entries, granularity=granularity)
    for found in reader.blocks((tensor.base, *tensor.experts), block_entries=at_once):
        base, *experts = (
            _to_shape(values, shape, columns, granularity) for values in to_float_tensors(found)
        )
        yield Block(
            base=base, experts=experts, thresholds=thresholds, dtype=TORCH_DTYPES[dtype], name=tensor.name, start=tensor.start + found.start,
            shape=tensor.shape, expert_names=expert_names, known=known,
        )  # fmt: skip


def _to_shape(
    values: torch.Tensor, shape: Sequence[int], columns: int, granularity: Granularity
) -> torch.Tensor:
    if granularity == "entry":
        return values
    return values.reshape(-1, columns) if granularity == "row" else values.reshape(tuple(shape))
