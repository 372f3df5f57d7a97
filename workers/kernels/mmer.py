"""MMER in one pass over a block: trim, elect, disjoint merge, the masks and their statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.locate import ELECT_MAX, elect_three, elect_tile, trim_tile
from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    compiled,
    count_bits,
    narrow,
    pack_bits,
    select,
    subtract_at,
    sum_squares,
    turn_sign,
    widen,
    widen_at,
)


@compiled
def merge_mmer(
    inputs: Any, codes: Any, num_entries: int, thresholds: Any, how: int, half_scales: Any, out_code: int, out: Any, masks: Any,
    mask_start: int, counts: Any, overlaps: Any, squares: Any,
) -> None:  # fmt: skip
    """Write τ⋆ of one block to `out` and the packed masks to `masks` (rows of bytes, from
    `mask_start`); add up the statistics.

    Args:
        how: ELECT_SUM or ELECT_MEAN.
        half_scales: λᵢ·0.5 per expert, float32.
        counts: int64, rows kept, agreeing, masked (per expert) and consensus (per number of experts
            that want an entry).
        overlaps: int64 per pair of experts.
        squares: float64, squared norm per task vector before trimming, then of τ⋆ as stored.
    """
    num_experts = inputs.shape[0] - 1
    tiles = np.empty((5, TILE_ENTRIES), np.float32)
    base, total, merged, agreeing, whole = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    deltas = np.empty((num_experts, TILE_ENTRIES), np.float32)
    weights = np.ones(num_experts, np.float32)
    scratch = np.empty(TILE_ENTRIES, np.float64)
    wanted = np.zeros((num_experts, TILE_ENTRIES // 64), np.uint64)
    votes = np.empty((4, TILE_ENTRIES // 64), np.uint64)
    mask = np.zeros(TILE_ENTRIES, np.uint8)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(num_experts):
            delta = deltas[expert]
            subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, whole)
            squares[expert] += sum_squares(whole, count, scratch)
            trim_tile(whole, count, thresholds[expert], delta)
            counts[0, expert] += count_not_zero(delta, count)
        if num_experts == 3 and how != ELECT_MAX:
            elect_three(deltas, weights, 0, count, how, np.float32(0), total, merged, counts[1])
        else:
            elect_tile(deltas, weights, 0, count, how, np.float32(0), total, merged, agreeing)
            for expert in range(num_experts):
                counts[1, expert] += count_agreeing(deltas[expert], total, count)
        narrow(merged, out_code, count, out, start)
        widen(out, out_code, start, count, merged)
        squares[num_experts] += sum_squares(merged, count, scratch)
        for expert in range(num_experts):
            mask_tile(deltas[expert], merged, count, half_scales[expert], mask)
            bits = wanted[expert].view(np.uint8)
            if count < TILE_ENTRIES:
                bits[:] = 0
            pack_bits(mask, count, bits, 0)
            target, first = masks[expert], mask_start + start // 8
            target[first : first + (count + 7) // 8] = bits[: (count + 7) // 8]
            counts[2, expert] += count_bits(wanted[expert])
        count_votes(wanted, count, votes, counts[3], overlaps)


@compiled
def count_not_zero(values: Any, count: int) -> Any:
    """Return how many entries of a tile are not 0."""
    found = np.int32(0)
    for i in range(count):
        found = np.int32(found + np.int32(values[i] != np.float32(0)))
    return np.int64(found)


@compiled
def mask_tile(delta: Any, merged: Any, count: int, half_scale: Any, mask: Any) -> None:
    """Set `mask` (uint8) where a trimmed task vector has the sign of τ⋆ and at least `half_scale`
    times its magnitude.
    """
    zero, infinite = np.float32(0), np.float32(np.inf)
    for i in range(count):
        star = merged[i]
        turned = turn_sign(delta[i], star)
        limit = select((star > zero) | (star < zero), zero, infinite)
        mask[i] = (turned > limit) & (turned >= half_scale * abs(star))


@compiled
def count_agreeing(delta: Any, total: Any, count: int) -> Any:
    """Return how many entries of a tile have the sign of `total`."""
    zero = np.float32(0)
    found = np.int32(0)
    for i in range(count):
        value, elected = delta[i], total[i]
        found = np.int32(
            found
            + np.int32(((value > zero) & (elected > zero)) | ((value < zero) & (elected < zero)))
        )
    return np.int64(found)


@compiled
def count_votes(wanted: Any, count: int, votes: Any, consensus: Any, overlaps: Any) -> None:
    """Add how many of the first `count` entries are wanted by 0, 1, …, n experts, and by both
    experts of each pair.

    Args:
        wanted: uint64 (experts, a bit per entry of a tile).
        votes: uint64 (4, as long), scratch: three binary digits of the number of experts per entry,
            and what is counted.
    """
    num_experts = wanted.shape[0]
    digits, chosen = votes[:3], votes[3]
    left = count
    if num_experts < 8:
        for digit in range(3):
            for i in range(wanted.shape[1]):
                digits[digit, i] = np.uint64(0)
        for expert in range(num_experts):
            row = wanted[expert]
            for i in range(wanted.shape[1]):
                carry = row[i] & digits[0, i]
                digits[0, i] = digits[0, i] ^ row[i]
                more = carry & digits[1, i]
                digits[1, i] = digits[1, i] ^ carry
                digits[2, i] = digits[2, i] ^ more
        for number in range(1, num_experts + 1):
            for i in range(wanted.shape[1]):
                low = digits[0, i] if number & 1 else ~digits[0, i]
                middle = digits[1, i] if number & 2 else ~digits[1, i]
                high = digits[2, i] if number & 4 else ~digits[2, i]
                chosen[i] = low & middle & high
            found = count_bits(chosen)
            consensus[number] += found
            left -= found
    else:
        for word in range(wanted.shape[1]):
            for bit in range(64):
                number = 0
                for expert in range(num_experts):
                    number += int((wanted[expert, word] >> np.uint64(bit)) & np.uint64(1))
                if number:
                    consensus[number] += 1
                    left -= 1
    consensus[0] += left
    pair = 0
    for expert in range(num_experts):
        for partner in range(expert + 1, num_experts):
            one, other = wanted[expert], wanted[partner]
            for i in range(wanted.shape[1]):
                chosen[i] = one[i] & other[i]
            overlaps[pair] += count_bits(chosen)
            pair += 1
