"""DELLA in one pass over whole rows: ranks within a row, random dropping by rank, and the sum or
election of what is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.locate import draw_tile, put_together
from mmerge.workers.kernels.tiles import TILE_ENTRIES, compiled, narrow, subtract_at, widen_at

NUM_BUCKETS = 1 << 15
"""One for each value of the upper 15 bits of a magnitude."""
MAX_LATE = 256
"""So many entries with lower bits are sorted one by one; where a row has more, all of it is sorted.
"""


@compiled
def rank_row(bits: Any, count: int, sorting: Any, buckets: Any, ranks: Any) -> None:
    """Write the ascending rank of each magnitude of a row to `ranks` (float32); of equal ones the
    lower position is lower.

    Task vectors of 16-bit checkpoints have few values, nearly all without lower 16 bits: they are
    counted by their upper bits, and the few others of a bucket, all larger than those without lower
    bits, come behind them.

    Args:
        bits: uint32, float32 values as bits.
        sorting: uint32 (4, at least the row's length), scratch.
        buckets: int64 (NUM_BUCKETS), scratch.
    """
    keys, late, places = sorting[0], sorting[1], sorting[2]
    smallest, largest = np.uint32(0xFFFFFFFF), np.uint32(0)
    with_lower = np.int32(0)
    for i in range(count):
        # All NaN are equal, above Inf.
        key = min(np.uint32(bits[i] & np.uint32(0x7FFFFFFF)), np.uint32(0x7F800001))
        keys[i] = key
        places[i] = key >> np.uint32(16)
        with_lower = np.int32(with_lower + np.int32((key & np.uint32(0xFFFF)) != 0))
        # Less 1, so that 0, far below all others, does not widen the range of buckets; its bucket
        # is the first.
        smallest, largest = min(smallest, np.uint32(key - np.uint32(1))), max(largest, key)
    if with_lower > MAX_LATE:
        sort_row(bits, count, sorting[0], sorting[1], sorting[2], sorting[3], buckets, ranks)
        return
    first, last = max(np.int64(smallest >> np.uint32(16)), 1), np.int64(largest >> np.uint32(16))
    used = buckets[first : last + 1]
    buckets[0] = 0
    for i in range(len(used)):
        used[i] = 0
    for i in range(count):
        buckets[np.uint64(places[i])] += 1
    total = buckets[0]
    buckets[0] = 0
    for i in range(len(used)):
        found = used[i]
        used[i] = total
        total += found
    if with_lower == 0:
        for i in range(count):
            place = np.uint64(places[i])
            rank = buckets[place]
            ranks[i] = np.float32(rank)
            buckets[place] = rank + 1
        return
    num_late = np.int64(0)
    for i in range(count):
        key = keys[i]
        if key & np.uint32(0xFFFF) == 0:
            place = np.uint64(places[i])
            rank = buckets[place]
            ranks[i] = np.float32(rank)
            buckets[place] = rank + 1
        else:
            # Insertion by key; positions come in order, so equal keys stay in order.
            where = num_late
            while where > 0 and keys[np.uint64(late[where - 1])] > key:
                late[where] = late[where - 1]
                where -= 1
            late[where] = np.uint32(i)
            num_late += 1
    for i in range(num_late):
        position = np.uint64(late[i])
        place = np.uint64(places[position])
        ranks[position] = np.float32(buckets[place])
        buckets[place] += 1


@compiled
def sort_row(
    bits: Any,
    count: int,
    keys: Any,
    order: Any,
    spare_keys: Any,
    spare_order: Any,
    buckets: Any,
    ranks: Any,
) -> None:
    """Write the ascending ranks of any magnitudes: a radix sort of the 31 bits by 11, 10 and 10.

    A digit that all have in common costs one pass and no move.

    Args:
        bits: uint32, float32 values as bits.
        keys, order, spare_keys, spare_order: uint32, as long as the row.
        buckets: int64, at least 2,048.
    """
    for i in range(count):
        key = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        keys[i] = min(key, np.uint32(0x7F800001))  # all NaN are equal, above Inf
        order[i] = np.uint32(i)
    source, target, source_order, target_order = keys, spare_keys, order, spare_order
    for digit in range(3):
        shift, mask = (
            np.uint32(0 if digit == 0 else (11 if digit == 1 else 21)),
            np.uint32(0x7FF if digit == 0 else 0x3FF),
        )
        for i in range(2048):
            buckets[i] = 0
        for i in range(count):
            buckets[np.uint64((source[i] >> shift) & mask)] += 1
        if buckets[np.uint64((source[0] >> shift) & mask)] == count:
            continue
        total = 0
        for i in range(2048):
            found = buckets[i]
            buckets[i] = total
            total += found
        for i in range(count):
            key = source[i]
            bucket = np.uint64((key >> shift) & mask)
            place = np.uint64(buckets[bucket])
            buckets[bucket] += 1
            target[place] = key
            target_order[place] = source_order[i]
        source, target, source_order, target_order = target, source, target_order, source_order
    for i in range(count):
        ranks[np.uint64(source_order[i])] = np.float32(i)


@compiled
def drop_row(delta: Any, keep: Any, chance: Any, count: int, divides: Any, factor: Any) -> None:
    """Set entries of a row to 0 where `chance` is not below `keep`, and rescale the rest."""
    zero = np.float32(0)
    if divides != zero:
        for i in range(count):
            delta[i] = delta[i] / keep[i]
    for i in range(count):
        delta[i] = (delta[i] if chance[i] < keep[i] else zero) * factor


@compiled
def merge_by_row(
    inputs: Any, codes: Any, num_entries: int, position: Any, columns: int, drops: Any, numbers: Any, keys: Any, weights: Any, how: int,
    zero_sign: Any, divisor: Any, scale: Any, out_code: int, out: Any,
) -> None:  # fmt: skip
    """Write θ₀ + scale·F(Sub(τ₁), …) of whole rows to `out`: Sub drops at random, with
    probabilities by rank within the row.

    Args:
        columns: entries of a row.
        drops: int64 per expert, whether it drops at all.
        numbers: float32 (experts, 5): lowest keep probability, its span (0: the same for all),
            whether what is kept is divided by its probability, a factor on what is kept, and the
            mean keep probability.
    """
    num_experts = inputs.shape[0] - 1
    tiles = np.empty((4, TILE_ENTRIES), np.float32)
    rest, base_tile = tiles[:3], tiles[3]
    deltas = np.empty((num_experts, columns), np.float32)
    rows = np.empty((3, columns), np.float32)
    base, ranks, chance = rows[0], rows[1], rows[2]
    sorting = np.empty((4, columns), np.uint32)
    words = np.empty(columns // 2 + 1, np.uint64)
    bits = words.view(np.uint32)
    buckets = np.empty(NUM_BUCKETS, np.int64)
    zero, one = np.float32(0), np.float32(1)
    last = np.float32(max(columns - 1, 1))
    for row_start in range(0, num_entries, columns):
        widen_at(inputs[0], codes[0], row_start, columns, base)
        for expert in range(num_experts):
            delta, weight = deltas[expert], weights[expert]
            subtract_at(inputs[expert + 1], codes[expert + 1], row_start, columns, base, delta)
            if drops[expert] == 1:
                lowest, span, divides, factor = (
                    numbers[expert, 0],
                    numbers[expert, 1],
                    numbers[expert, 2],
                    numbers[expert, 3],
                )
                draw_tile(
                    keys[expert], position + np.uint64(row_start), columns, words, bits, chance
                )
                if columns > 1 and span != zero:
                    rank_row(delta.view(np.uint32), columns, sorting, buckets, ranks)
                    for i in range(columns):
                        ranks[i] = lowest + ranks[i] / last * span
                else:
                    for i in range(columns):
                        ranks[i] = numbers[expert, 4]
                drop_row(delta, ranks, chance, columns, divides, factor)
            if weight != one:
                for i in range(columns):
                    delta[i] = weight * delta[i]
        for start in range(0, columns, TILE_ENTRIES):
            count = min(TILE_ENTRIES, columns - start)
            part = base[start : start + count]
            for i in range(count):
                base_tile[i] = part[i]
            merged = put_together(
                deltas, weights, start, count, how, zero_sign, divisor, scale, base_tile, rest
            )
            narrow(merged, out_code, count, out, row_start + start)
