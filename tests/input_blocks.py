"""Blocks of base and experts as the block reader yields them, made from tensors in memory."""

from __future__ import annotations

import numpy as np
import torch

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.checkpoints.dtypes import SAFETENSORS_DTYPES, to_bytes
from mmerge.workers.kernels.tiles import CODES


def make_block(rows: list[torch.Tensor]) -> InputBlock:
    """Return flat tensors of equal length, base first, as one block."""
    raw = [to_bytes(row) for row in rows]
    stride = max(len(data) for data in raw) + 64
    stride += -stride % 64
    array = np.zeros((len(rows), stride), np.uint8)
    for target, data in zip(array, raw, strict=True):
        target[: len(data)] = data
    codes = np.array([CODES[SAFETENSORS_DTYPES[row.dtype]] for row in rows], np.int64)
    return InputBlock(0, rows[0].numel(), list(array), codes, tuple(raw))
