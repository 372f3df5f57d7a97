"""Read θ₀, τ⋆ and masks of one tensor and reconstruct weights block by block, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.manifests.format.table import StoredRow
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES, to_bytes
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.masked_weights import BlockKernel, can_use_numba
from mmerge.workers.runtime.host_memory import empty_tensor

BLOCK_ENTRIES = 1 << 19
"""Entries read, hashed and combined together: θ₀, τ⋆ and bits of a block stay in the L2 cache."""


@dataclass(frozen=True)
class MaskedWeight:
    """A reconstructed tensor, and what it was reconstructed from."""

    values: torch.Tensor
    """θ₀ + mean(factorⱼ·mⱼ)∘τ⋆."""
    delta: torch.Tensor | None
    """τ⋆ as it is stored, if asked for."""
    masks: torch.Tensor
    """Packed masks as they are stored, uint8 [experts, bytes]."""


def read_masked_weight(
    reader: BuildReader,
    pieces: Sequence[Sequence[StoredRow]],
    *,
    dtype: torch.dtype,
    factors: Sequence[float],
    keeps_delta: bool = False,
) -> MaskedWeight | None:
    """Return a tensor reconstructed from θ₀, τ⋆ and masks, computed on the calling thread.

    None where the tensor is stored in several pieces, or the kernel does not take its dtypes.

    Args:
        reader: reads and checks the pieces.
        pieces: the stored rows of θ₀, of τ⋆ and of each mask, see `BuildReader.masked_pieces`.
        dtype: of the values; computed in float32 and rounded once.
        factors: one per mask.
        keeps_delta: whether to return τ⋆ too.

    Raises:
        DamagedObject: the bytes do not match the digests in the manifest.
    """
    base_row, delta_row, *mask_rows = (rows[0] for rows in pieces)
    base_dtype, delta_dtype = (TORCH_DTYPES[row.dtype] for row in (base_row, delta_row))
    samples = [torch.empty(0, dtype=kind) for kind in (base_dtype, delta_dtype, dtype)]
    if any(len(rows) > 1 for rows in pieces) or not can_use_numba(*samples):
        return None
    values = empty_tensor(base_row.shape, dtype=dtype)
    delta = empty_tensor(delta_row.shape, dtype=delta_dtype) if keeps_delta else None
    masks = empty_tensor((len(factors), mask_rows[0].num_bytes), dtype=torch.uint8)
    for row, memory in zip(mask_rows, masks.numpy(), strict=True):
        reader.read_into(row, memory)
    kernel = BlockKernel(
        base=base_dtype,
        delta=delta_dtype,
        out=dtype,
        factors=factors,
        divisor=float(len(factors)),
    )
    out, bits = _bytes_of(values), masks.numpy()
    # θ₀ of the result's dtype is read to where the result will be: the kernel then overwrites bytes
    # that are still in a cache.
    is_in_place = base_dtype == dtype
    base_blocks = reader.read_blocks(
        base_row,
        block_bytes=BLOCK_ENTRIES * base_dtype.itemsize,
        into=out if is_in_place else None,
    )
    delta_blocks = reader.read_blocks(
        delta_row,
        block_bytes=BLOCK_ENTRIES * delta_dtype.itemsize,
        into=None if delta is None else _bytes_of(delta),
    )
    start = 0
    for base_block, delta_block in zip(base_blocks, delta_blocks, strict=True):
        stop = start + len(delta_block) // delta_dtype.itemsize
        out_block = out[start * dtype.itemsize : stop * dtype.itemsize]
        kernel.add_block(
            out_block if is_in_place else base_block,
            delta_block,
            bits[:, start // 8 : -(-stop // 8)],
            out=out_block,
        )
        start = stop
    return MaskedWeight(values, delta, masks)


def _bytes_of(values: torch.Tensor) -> NDArray[np.uint8]:
    return np.frombuffer(to_bytes(values), np.uint8)
