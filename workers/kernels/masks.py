"""Merges with a mask per expert, in one pass over a block: locate, combine, the masks and their
statistics.

What the rules mean, and their definition in torch: workers/methods/mask_rules.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmerge.workers.kernels.locate import (
    KEEP_ALL,
    SUM,
    combine_tile,
    locate_tile,
    make_locate_buffers,
)
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
from mmerge.workers.kernels.unrolled import cut_rows

SIGNIFICANT, NEARER, ELECTED, SIGNIFICANT_SHORT = 0, 1, 2, 3
"""Kinds of mask rules: significant and of the sign of τ⋆ (MMER); nearer to τ⋆ than to 0 (TALL);
of the elected sign (EMR); the first where float32 holds every product λ/2·|τ⋆|."""


class MaskRecord(NamedTuple):
    """How the mask of each expert follows from its task vector and the merged one."""

    kind: int
    scales: tuple[np.float64, ...]
    """Per expert: `MaskRule.factor`, λ/2 of SIGNIFICANT_SHORT; not read with ELECTED."""


class MaskStatistics(NamedTuple):
    """Counts and squared norms of one tensor, added up block by block by the kernel."""

    kept: NDArray[np.int64]
    """Per expert, located entries that are not 0."""
    agreeing: NDArray[np.int64]
    """Per expert, located entries of the elected sign."""
    masked: NDArray[np.int64]
    """Per expert, entries of the mask that are set."""
    consensus: NDArray[np.int64]
    """By number of experts, 0 to n: entries whose mask is set by so many."""
    overlaps: NDArray[np.int64]
    """By pair of experts (0.1, 0.2, …, 1.2, …): entries whose mask is set by both."""
    squares: NDArray[np.float64]
    """Squared norm of each task vector before locating, then of τ⋆ as stored."""


@compiled
def merge_with_masks(
    inputs: Any,
    codes: Any,
    num_entries: int,
    position: Any,
    rules: Any,
    ties: Any,
    combination: Any,
    mask_rule: Any,
    out_code: int,
    out: Any,
    masks: Any,
    mask_start: int,
    statistics: Any,
) -> None:
    """Write τ⋆ of one block to `out` and the packed masks to `masks` (rows of bytes, from
    `mask_start`); add up the statistics.

    The masks are those of τ⋆ as stored: the tile is rounded, and read back, before they are formed.

    Args:
        inputs, codes, position, rules, ties: see `merge_located`.
        combination: CombineRecord with weights, divisor and scale 1.
        mask_rule: MaskRecord.
        statistics: MaskStatistics.
    """
    num_experts = len(combination.weights)
    kept, agreeing, squares = statistics.kept, statistics.agreeing, statistics.squares
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, total, merged = tiles[0], tiles[1], tiles[2]
    deltas = np.empty((num_experts, TILE_ENTRIES), np.float32)
    # One tile for all experts stays in the first cache; NEARER alone reads them again.
    keeps_whole = mask_rule.kind == NEARER
    wholes = np.empty((num_experts if keeps_whole else 1, TILE_ENTRIES), np.float32)
    buffers = make_locate_buffers()
    scratch = np.empty(TILE_ENTRIES, np.float64)
    mask_bits = np.zeros((num_experts, TILE_ENTRIES // 64), np.uint64)
    votes = np.empty((4, TILE_ENTRIES // 64), np.uint64)
    mask = np.zeros(TILE_ENTRIES, np.uint8)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(num_experts):
            delta, rule = deltas[expert], rules[expert]
            whole = wholes[expert if keeps_whole else 0]
            subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, whole)
            squares[expert] += sum_squares(whole, count, scratch)
            if rule.kind == KEEP_ALL:
                for i in range(count):
                    delta[i] = whole[i]
            else:
                first = position + np.uint64(start)
                locate_tile(rule, ties[expert], whole, count, first, buffers, delta)
            kept[expert] += count_not_zero(delta, count)
        rows = cut_rows(deltas, combination.weights, 0, count)
        counts = combine_tile(rows, combination, count, total, merged)
        for expert in range(num_experts):
            if combination.kind == SUM:
                agreeing[expert] += count_agreeing(deltas[expert], merged, count)
            else:
                agreeing[expert] += counts[expert]
        narrow(merged, out_code, count, out, start)
        widen(out, out_code, start, count, merged)
        squares[num_experts] += sum_squares(merged, count, scratch)
        for expert in range(num_experts):
            whole = wholes[expert if keeps_whole else 0]
            scale = mask_rule.scales[expert]
            mask_tile(mask_rule.kind, whole, deltas[expert], total, merged, count, scale, mask)
            bits = mask_bits[expert].view(np.uint8)
            if count < TILE_ENTRIES:
                bits[:] = 0
            pack_bits(mask, count, bits, 0)
            target, first_byte = masks[expert], mask_start + start // 8
            target[first_byte : first_byte + (count + 7) // 8] = bits[: (count + 7) // 8]
            statistics.masked[expert] += count_bits(mask_bits[expert])
        count_votes(mask_bits, count, votes, statistics.consensus, statistics.overlaps)


@compiled
def merge_consensus(
    inputs: Any,
    codes: Any,
    num_entries: int,
    position: Any,
    rules: Any,
    ties: Any,
    combination: Any,
    mask_rule: Any,
    agreement: int,
    scale: Any,
    out_code: int,
    out: Any,
) -> None:
    """Write θ₀ + scale·m∘τ_MT of one block to `out`, m the entries that at least `agreement` masks
    hold. The masks are those of the merged task vector in float32.

    For the arguments see `merge_with_masks`.
    """
    num_experts = len(combination.weights)
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, total, merged = tiles[0], tiles[1], tiles[2]
    deltas = np.empty((num_experts, TILE_ENTRIES), np.float32)
    wholes = np.empty((num_experts, TILE_ENTRIES), np.float32)
    buffers = make_locate_buffers()
    mask = np.zeros(TILE_ENTRIES, np.uint8)
    votes = np.zeros(TILE_ENTRIES, np.int32)
    zero = np.float32(0)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(num_experts):
            whole, delta, rule = wholes[expert], deltas[expert], rules[expert]
            subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, whole)
            if rule.kind == KEEP_ALL:
                for i in range(count):
                    delta[i] = whole[i]
            else:
                first = position + np.uint64(start)
                locate_tile(rule, ties[expert], whole, count, first, buffers, delta)
        rows = cut_rows(deltas, combination.weights, 0, count)
        combine_tile(rows, combination, count, total, merged)
        for i in range(count):
            votes[i] = 0
        for expert in range(num_experts):
            whole, mask_scale = wholes[expert], mask_rule.scales[expert]
            mask_tile(mask_rule.kind, whole, deltas[expert], total, merged, count, mask_scale, mask)
            for i in range(count):
                votes[i] = votes[i] + np.int32(mask[i])
        for i in range(count):
            merged[i] = base[i] + scale * select(votes[i] >= agreement, merged[i], zero)
        narrow(merged, out_code, count, out, start)


@compiled
def count_not_zero(values: Any, count: int) -> Any:
    """Return how many entries of a tile are not 0."""
    num_found = np.int32(0)
    for i in range(count):
        num_found = np.int32(num_found + np.int32(values[i] != np.float32(0)))
    return np.int64(num_found)


@compiled
def mask_tile(
    kind: int,
    whole: Any,
    delta: Any,
    total: Any,
    merged: Any,
    count: int,
    scale: Any,
    mask: Any,
) -> None:
    """Set `mask` (uint8) where the rule holds for one expert.

    Args:
        whole: the task vector; delta: what of it is located.
        total: has the elected sign, see `combine_tile`.
        merged: τ⋆, as stored where it is stored.
        scale: float64; SIGNIFICANT compares in float64, where the product decides no tie, the
            others in float32.
    """
    zero, infinite, short = np.float32(0), np.float32(np.inf), np.float32(scale)
    if kind == SIGNIFICANT:
        for i in range(count):
            star = merged[i]
            turned = turn_sign(delta[i], star)
            # Where τ⋆ is 0 (or NaN), nothing is above infinity.
            limit = select((star > zero) | (star < zero), zero, infinite)
            significant = np.float64(turned) >= scale * np.float64(abs(star))
            mask[i] = (turned > limit) & significant
    elif kind == SIGNIFICANT_SHORT:
        for i in range(count):
            star = merged[i]
            turned = turn_sign(delta[i], star)
            limit = select((star > zero) | (star < zero), zero, infinite)
            mask[i] = (turned > limit) & (turned >= short * abs(star))
    elif kind == NEARER:
        for i in range(count):
            mask[i] = abs(whole[i]) > short * abs(merged[i] - whole[i])
    else:
        for i in range(count):
            mask[i] = turn_sign(delta[i], total[i]) > zero


@compiled
def count_agreeing(delta: Any, total: Any, count: int) -> Any:
    """Return how many entries of a tile have the sign of `total`."""
    zero, infinite = np.float32(0), np.float32(np.inf)
    num_agreeing = np.int32(0)
    for i in range(count):
        limit = select((total[i] > zero) | (total[i] < zero), zero, infinite)
        num_agreeing = np.int32(num_agreeing + np.int32(turn_sign(delta[i], total[i]) > limit))
    return np.int64(num_agreeing)


@compiled
def count_votes(mask_bits: Any, count: int, votes: Any, consensus: Any, overlaps: Any) -> None:
    """Add how many of the first `count` entries are wanted by 0, 1, …, n experts, and by both
    experts of each pair.

    Args:
        mask_bits: uint64 (experts, a bit per entry of a tile).
        votes: uint64 (4, as long), scratch: three binary digits of the number of experts per entry,
            and what is counted.
    """
    num_experts = mask_bits.shape[0]
    digits, chosen = votes[:3], votes[3]
    left = count
    if num_experts < 8:
        for digit in range(3):
            for i in range(mask_bits.shape[1]):
                digits[digit, i] = np.uint64(0)
        for expert in range(num_experts):
            row = mask_bits[expert]
            for i in range(mask_bits.shape[1]):
                carry = row[i] & digits[0, i]
                digits[0, i] = digits[0, i] ^ row[i]
                more = carry & digits[1, i]
                digits[1, i] = digits[1, i] ^ carry
                digits[2, i] = digits[2, i] ^ more
        for number in range(1, num_experts + 1):
            for i in range(mask_bits.shape[1]):
                low = digits[0, i] if number & 1 else ~digits[0, i]
                middle = digits[1, i] if number & 2 else ~digits[1, i]
                high = digits[2, i] if number & 4 else ~digits[2, i]
                chosen[i] = low & middle & high
            num_found = count_bits(chosen)
            consensus[number] += num_found
            left -= num_found
    else:
        for word in range(mask_bits.shape[1]):
            for bit in range(64):
                number = 0
                for expert in range(num_experts):
                    number += int((mask_bits[expert, word] >> np.uint64(bit)) & np.uint64(1))
                if number:
                    consensus[number] += 1
                    left -= 1
    consensus[0] += left
    pair = 0
    for expert in range(num_experts):
        for partner in range(expert + 1, num_experts):
            first, second = mask_bits[expert], mask_bits[partner]
            for i in range(mask_bits.shape[1]):
                chosen[i] = first[i] & second[i]
            overlaps[pair] += count_bits(chosen)
            pair += 1
