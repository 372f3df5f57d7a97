"""DELLA in one pass over whole rows: ranks within a row, random dropping by rank, and the sum or
election of what is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.locate import DROP_BY_RANK, combine_tile, draw_tile
from mmerge.workers.kernels.tiles import TILE_ENTRIES, compiled, narrow, subtract_at, widen_at
from mmerge.workers.kernels.unrolled import cut_rows

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
        bucket_size = used[i]
        used[i] = total
        total += bucket_size
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
            bucket_size = buckets[i]
            buckets[i] = total
            total += bucket_size
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
def drop_row(
    rule: Any, delta: Any, ranks: Any, position: Any, columns: int, words: Any, chance: Any
) -> None:
    """Set entries of a row to 0 where the random number is not below the keep probability, and
    rescale the rest.

    Args:
        rule: record of LOCATE_RULE, of kind DROP_BY_RANK.
        ranks: float32, of the magnitudes of the row (without a span: not read); becomes the keep
            probabilities.
        words, chance: see `draw_tile`.
    """
    zero = np.float32(0)
    last = np.float32(max(columns - 1, 1))
    draw_tile(rule.key, position, columns, words, words.view(np.uint32), chance)
    if columns > 1 and rule.span != zero:
        for i in range(columns):
            ranks[i] = rule.lowest + ranks[i] / last * rule.span
    else:
        for i in range(columns):
            ranks[i] = rule.density
    if rule.divides:
        for i in range(columns):
            delta[i] = delta[i] / ranks[i]
    factor = rule.factor
    for i in range(columns):
        delta[i] = (delta[i] if chance[i] < ranks[i] else zero) * factor


@compiled
def merge_by_row(
    inputs: Any,
    codes: Any,
    num_entries: int,
    position: Any,
    columns: int,
    rules: Any,
    combination: Any,
    out_code: int,
    out: Any,
) -> None:
    """Write θ₀ + scale·F(Sub(τ₁), …) of whole rows to `out`: Sub drops at random, with
    probabilities by rank within the row.

    Args:
        columns: entries of a row.
        rules: LOCATE_RULE per expert, of kind DROP_BY_RANK or KEEP_ALL.
        combination: CombineRecord. For the others see `merge_located`.
    """
    weights, scale = combination.weights, combination.scale
    num_experts = len(weights)
    tiles = np.empty((2, TILE_ENTRIES), np.float32)
    total, merged = tiles[0], tiles[1]
    deltas = np.empty((num_experts, columns), np.float32)
    row = np.empty((3, columns), np.float32)
    base, ranks, chance = row[0], row[1], row[2]
    sorting = np.empty((4, columns), np.uint32)
    words = np.empty(columns // 2 + 1, np.uint64)
    buckets = np.empty(NUM_BUCKETS, np.int64)
    zero, unit = np.float32(0), np.float32(1)
    for row_start in range(0, num_entries, columns):
        widen_at(inputs[0], codes[0], row_start, columns, base)
        for expert in range(num_experts):
            delta, rule, weight = deltas[expert], rules[expert], weights[expert]
            subtract_at(inputs[expert + 1], codes[expert + 1], row_start, columns, base, delta)
            if rule.kind == DROP_BY_RANK:
                if columns > 1 and rule.span != zero:
                    rank_row(delta.view(np.uint32), columns, sorting, buckets, ranks)
                first = position + np.uint64(row_start)
                drop_row(rule, delta, ranks, first, columns, words, chance)
            if weight != unit:
                for i in range(columns):
                    delta[i] = weight * delta[i]
        for start in range(0, columns, TILE_ENTRIES):
            count = min(TILE_ENTRIES, columns - start)
            combine_tile(cut_rows(deltas, weights, start, count), combination, count, total, merged)
            part = base[start : start + count]
            for i in range(count):
                merged[i] = part[i] + scale * merged[i]
            narrow(merged, out_code, count, out, row_start + start)
