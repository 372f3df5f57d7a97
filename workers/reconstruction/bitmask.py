"""Bit masks: eight entries per byte, the first in the highest bit, padded to 8-byte words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmerge.manifests.format.object_header import packed_bytes


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a boolean mask (any shape) packed in C order, uint8 [packed_bytes(mask.numel())]."""
    packed = torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy()))
    return torch.nn.functional.pad(packed, (0, packed_bytes(mask.numel()) - packed.numel()))


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the boolean mask of `shape` from its packed bytes (uint8), on the same device."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed.reshape(-1, 1) >> shifts) & 1
    num_entries = int(np.prod(tuple(shape), dtype=np.int64))
    return bits.reshape(-1)[:num_entries].bool().reshape(tuple(shape))


def pack_rows(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a packed mask of a matrix [rows, width], packed by rows: uint8 [rows, ⌈width/8⌉]."""
    rows, width = shape
    if width % 8 == 0:
        return packed[: rows * width // 8].reshape(rows, width // 8)
    mask = torch.nn.functional.pad(unpack_mask(packed, shape), (0, -width % 8))
    return pack_mask(mask)[: rows * ((width + 7) // 8)].reshape(rows, -1)


def unpack_rows(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return the boolean mask [..., width] of rows from `pack_rows`, uint8 [..., ⌈width/8⌉]."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :width]
