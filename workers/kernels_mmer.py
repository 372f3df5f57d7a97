"""MMER in one pass over a block: trim, elect, disjoint merge, the masks and their statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels import TILE_ENTRIES, compiled, count_ones, narrow, pack_bits, sum_squares, widen, widen_at
from mmerge.workers.kernels_locate import elect_tile


@compiled
def merge_mmer(
    inputs: Any, codes: Any, num_entries: int, thresholds: Any, how: int, half_scales: Any, out_code: int, out: Any, masks: Any,
    mask_start: int, counts: Any, overlaps: Any, squares: Any,
) -> None:  # fmt: skip
    """Write τ⋆ of one block to `out` and the packed masks to `masks` (rows of bytes, from `mask_start`); add up the statistics.

    Args:
        how: ELECT_SUM or ELECT_MEAN.
        half_scales: λᵢ·0.5 per expert, float32.
        counts: int64, rows kept, agreeing, masked (per expert) and consensus (per number of experts that want an entry).
        overlaps: int64 per pair of experts.
        squares: float64, squared norm per task vector before trimming, then of τ⋆ as stored.
    """
    num_experts = inputs.shape[0] - 1
    zero = np.float32(0)
    tiles = np.empty((4, TILE_ENTRIES), np.float32)
    base, total, merged, agreeing = tiles[0], tiles[1], tiles[2], tiles[3]
    deltas = np.empty((num_experts, TILE_ENTRIES), np.float32)
    weights = np.ones(num_experts, np.float32)
    scratch = np.empty(TILE_ENTRIES, np.float64)
    wanted = np.zeros((num_experts, TILE_ENTRIES), np.uint8)
    votes = np.empty(TILE_ENTRIES, np.uint8)
    flags = np.empty(TILE_ENTRIES, np.uint8)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(num_experts):
            delta, threshold = deltas[expert], thresholds[expert]
            widen_at(inputs[expert + 1], codes[expert + 1], start, count, delta)
            for i in range(count):
                delta[i] = delta[i] - base[i]
            squares[expert] += sum_squares(delta, count, scratch)
            for i in range(count):
                value = delta[i]
                delta[i] = value if abs(value) >= threshold else zero
        elect_tile(deltas, weights, 0, count, how, zero, total, merged, agreeing)
        narrow(merged, out_code, count, out, start)
        widen(out, out_code, start, count, merged)
        for i in range(TILE_ENTRIES):
            votes[i] = 0
        for expert in range(num_experts):
            delta, half_scale, mask = deltas[expert], half_scales[expert], wanted[expert]
            for i in range(count):
                value, star = delta[i], merged[i]
                congruent = ((value > zero) & (star > zero)) | ((value < zero) & (star < zero))
                mask[i] = congruent & (abs(value) >= half_scale * abs(star))
            for i in range(count, TILE_ENTRIES):
                mask[i] = 0
            for i in range(TILE_ENTRIES):
                votes[i] = votes[i] + mask[i]
            pack_bits(mask, count, masks[expert], mask_start + start // 8)
            counts[2, expert] += count_ones(mask, mask)
            counts[0, expert] += count_kept(delta, count, flags)
            counts[1, expert] += count_agreeing(delta, total, count, flags)
        squares[num_experts] += sum_squares(merged, count, scratch)
        count_votes(votes, wanted, count, flags, counts[3], overlaps)


@compiled
def count_kept(delta: Any, count: int, flags: Any) -> Any:
    """Return how many entries of a tile are not zero."""
    for i in range(count):
        flags[i] = delta[i] != np.float32(0)
    for i in range(count, TILE_ENTRIES):
        flags[i] = 0
    return count_ones(flags, flags)


@compiled
def count_agreeing(delta: Any, total: Any, count: int, flags: Any) -> Any:
    """Return how many entries of a tile have the sign of `total`."""
    zero = np.float32(0)
    for i in range(count):
        value, elected = delta[i], total[i]
        flags[i] = ((value > zero) & (elected > zero)) | ((value < zero) & (elected < zero))
    for i in range(count, TILE_ENTRIES):
        flags[i] = 0
    return count_ones(flags, flags)


@compiled
def count_votes(votes: Any, wanted: Any, count: int, flags: Any, consensus: Any, overlaps: Any) -> None:
    """Add how many of the first `count` entries are wanted by 0, 1, …, n experts, and by both experts of each pair."""
    num_experts = wanted.shape[0]
    left = count
    for number in range(1, num_experts + 1):
        for i in range(TILE_ENTRIES):
            flags[i] = votes[i] == number
        found = count_ones(flags, flags)
        consensus[number] += found
        left -= found
    consensus[0] += left
    pair = 0
    for expert in range(num_experts):
        for partner in range(expert + 1, num_experts):
            overlaps[pair] += count_ones(wanted[expert], wanted[partner])
            pair += 1
