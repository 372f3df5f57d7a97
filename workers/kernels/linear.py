"""Weighted sums in one pass over a block: linear merge, NaiveMC."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.tiles import TILE_ENTRIES, compiled, narrow, subtract_at, widen_at


@compiled
def merge_linear(
    inputs: Any, codes: Any, num_entries: int, weights: Any, divisor: Any, out_code: int, out: Any
) -> None:
    """Write Σ wᵢθᵢ / divisor of one block to `out` (bytes); a divisor of 0 is no division."""
    tiles = np.empty((2, TILE_ENTRIES), np.float32)
    expert, total = tiles[0], tiles[1]
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        for i in range(count):
            total[i] = np.float32(0)
        for row in range(1, inputs.shape[0]):
            weight = weights[row - 1]
            widen_at(inputs[row], codes[row], start, count, expert)
            for i in range(count):
                total[i] = total[i] + weight * expert[i]
        if divisor != np.float32(0):
            for i in range(count):
                total[i] = total[i] / divisor
        narrow(total, out_code, count, out, start)


@compiled
def merge_mean(inputs: Any, codes: Any, num_entries: int, out_code: int, out: Any) -> None:
    """Write θ₀ + (Σ τᵢ)/n of one block to `out` (bytes)."""
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, expert, total = tiles[0], tiles[1], tiles[2]
    number = np.float32(inputs.shape[0] - 1)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        subtract_at(inputs[1], codes[1], start, count, base, total)
        for row in range(2, inputs.shape[0]):
            widen_at(inputs[row], codes[row], start, count, expert)
            for i in range(count):
                total[i] = total[i] + (expert[i] - base[i])
        for i in range(count):
            total[i] = base[i] + total[i] / number
        narrow(total, out_code, count, out, start)
