"""Blocks of one tensor, read from base and experts and widened to float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES
from mmerge.workers.checkpoints.input_digests import PieceDigests
from mmerge.workers.methods.interface import (
    Block,
    Granularity,
    TensorFacts,
    entries_at_once,
    num_columns,
)
from mmerge.workers.task import MeasureTask, MergeTask, RefineTask, TensorTask

OpenBlocks = Callable[[int], Iterator[InputBlock]]
"""Starts a pass over a tensor, with so many entries at once."""


def expect_inputs(
    task: RefineTask | MeasureTask | MergeTask,
    index: int,
    *,
    experts: Sequence[int] | None = None,
) -> PieceDigests:
    """Return the comparison of one pass over a tensor with what its scan read.

    Args:
        task: the task, with what its scan found.
        index: position of the tensor in the task.
        experts: positions of the experts that are read beside the base; all if absent.
    """
    tensor = task.tensors[index]
    positions = range(len(tensor.experts)) if experts is None else experts
    rows = [0, *(1 + position for position in positions)]
    sources = (tensor.base, *tensor.experts)
    checksums = task.input_checksums[index] if task.input_checksums else ()
    return PieceDigests(
        [sources[row] for row in rows],
        [task.input_digests[index][row] for row in rows],
        checksums=[checksums[row] for row in rows] if checksums else (),
    )


def read_blocks(
    tensor: TensorTask,
    open_blocks: OpenBlocks,
    *,
    facts: TensorFacts,
    dtype: str,
    block_entries: int,
) -> Iterator[Block]:
    """Yield the blocks of a piece of a tensor in order, as the method must see them."""
    shape = tensor.base.spec.shape
    columns, granularity = num_columns(shape), tensor.granularity
    at_once = entries_at_once(shape, block_entries, granularity=granularity)
    for block in open_blocks(at_once):
        base, *experts = (
            _to_shape(values, shape, columns, granularity) for values in to_float_tensors(block)
        )
        yield Block(
            base=base,
            experts=experts,
            thresholds=facts.thresholds,
            dtype=TORCH_DTYPES[dtype],
            name=facts.name,
            start=tensor.start + block.start,
            shape=facts.shape,
            expert_names=facts.expert_names,
            measured=facts.measured,
        )


def to_float_tensors(block: InputBlock) -> list[torch.Tensor]:
    """Return a block of base and experts as flat float32 tensors with their own memory."""
    names = ("F32", "BF16", "F16")
    tensors = []
    for row, code in zip(block.rows, block.codes.tolist(), strict=True):
        dtype = TORCH_DTYPES[names[code]]
        values = (
            torch.frombuffer(row.data, dtype=dtype, count=block.num_entries)
            if block.num_entries
            else torch.empty(0)
        )
        tensors.append(values.to(torch.float32, copy=True))
    return tensors


def _to_shape(
    values: torch.Tensor, shape: Sequence[int], columns: int, granularity: Granularity
) -> torch.Tensor:
    if granularity == "entry":
        return values
    return values.reshape(-1, columns) if granularity == "row" else values.reshape(tuple(shape))
