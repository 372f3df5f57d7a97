"""Weights read from a build and formed on the way, block by block, in one pass over the bytes: θ₀ +
m∘τ⋆.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.manifests.format.table import StoredRow
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES, to_bytes
from mmerge.workers.reconstruction.masked_weights import BlockFormer, can_form
from mmerge.workers.runtime.host_memory import Empty, empty_host

if TYPE_CHECKING:
    from mmerge.workers.reconstruction.build_reader import BuildReader

BLOCK_ENTRIES = 1 << 19
"""Entries that are read, digested and formed at once, whole bytes of bits: θ₀, τ⋆ and bits of a
block lie in a cache meanwhile.
"""


@dataclass(frozen=True)
class Formed:
    """What was read and formed."""

    values: torch.Tensor
    """θ₀ + (Σ factorⱼ·mⱼ / experts)∘τ⋆."""
    delta: torch.Tensor | None
    """τ⋆ as it is stored, if it was to be kept."""
    masks: torch.Tensor
    """Packed bits as they are stored, uint8 [experts, bytes]."""


def read_formed(
    reader: BuildReader,
    pieces: Sequence[Sequence[StoredRow]],
    *,
    dtype: torch.dtype,
    factors: Sequence[float],
    keeps_delta: bool = False,
    empty: Empty = empty_host,
) -> Formed | None:
    """Return a tensor formed from θ₀, τ⋆ and masks, on the thread that calls; None where it cannot
    be formed block by block.

    Args:
        reader: what reads and checks the pieces.
        pieces: where θ₀, τ⋆ and each mask lie.
        dtype: of the values; computed in float32 and rounded once.
        factors: one per mask.
        keeps_delta: whether τ⋆ is wanted too.
        empty: gives the memory of what is returned.

    Raises:
        DamagedObject: bytes are not what the manifest says.
    """
    rows = [found[0] for found in pieces]
    stored = [TORCH_DTYPES[row.dtype] for row in rows[:2]]
    if any(len(found) > 1 for found in pieces) or not can_form(
        *(torch.empty(0, dtype=each) for each in (*stored, dtype))
    ):
        return None
    values, delta = (
        empty(rows[0].shape, dtype),
        empty(rows[0].shape, stored[1]) if keeps_delta else None,
    )
    masks = empty((len(factors), rows[2].num_bytes), torch.uint8)
    for row, place in zip(rows[2:], masks.numpy(), strict=True):
        reader.read_into(row, place)
    former = BlockFormer(
        base=stored[0], delta=stored[1], out=dtype, factors=factors, divisor=float(len(factors))
    )
    out, bits = _bytes_of(values), masks.numpy()
    # Of the result's dtype θ₀ is read to where the result will be: what is formed then replaces
    # bytes that lie in a cache.
    is_in_place = stored[0] == dtype
    bases = reader.read_blocks(
        rows[0], block_bytes=BLOCK_ENTRIES * stored[0].itemsize, into=out if is_in_place else None
    )
    changes = reader.read_blocks(
        rows[1],
        block_bytes=BLOCK_ENTRIES * stored[1].itemsize,
        into=None if delta is None else _bytes_of(delta),
    )
    start = 0
    for base, change in zip(bases, changes, strict=True):
        stop = start + len(change) // stored[1].itemsize
        place = out[start * dtype.itemsize : stop * dtype.itemsize]
        former.form(
            place if is_in_place else base, change, bits[:, start // 8 : -(-stop // 8)], out=place
        )
        start = stop
    return Formed(values, delta, masks)


def _bytes_of(values: torch.Tensor) -> NDArray[np.uint8]:
    return np.frombuffer(to_bytes(values), np.uint8)
