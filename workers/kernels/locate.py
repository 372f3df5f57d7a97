"""Locate, then merge, in one pass over a block: what of each task vector is kept, and the weighted
sum or sign election of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    compiled,
    narrow,
    select,
    subtract_at,
    turn_sign,
    widen_at,
)

KEEP_ALL, TRIM, DROP, TOP = 0, 1, 2, 3
"""How entries are located: all; magnitudes at or above a threshold; at random; ranks between two
exact counts.
"""
SUM, ELECT_MEAN, ELECT_SUM, ELECT_MAX = 0, 1, 2, 3
"""How located task vectors are put together."""


STEP = np.uint64(0x9E3779B97F4A7C15)
"""What the state of the random numbers grows by from pair to pair of entries."""


@compiled
def mix_bits(state: Any) -> Any:
    """Return the 64 bits of a state (methods/randomness.py), in whose halves lie the random numbers
    of two entries.
    """
    mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@compiled
def draw_words(key: Any, position: Any, count: int, words: Any) -> Any:
    """Write the random bits of `count` entries from flat `position` on to `words`; return where
    among its uint32 those of the first lie.

    The upper 24 of an entry's 32 bits are its random number times 2²⁴. `words` is uint64, of more
    than count / 2; in memory the lower half of a word comes first, as its entry does.
    """
    odd = np.int64(position & np.uint64(1))
    num_words = (odd + count + 1) >> 1
    state = key + ((position >> np.uint64(1)) + np.uint64(1)) * STEP
    for i in range(num_words):
        words[i] = mix_bits(state)
        state = state + STEP
    return odd


@compiled
def draw_tile(key: Any, position: Any, count: int, words: Any, bits: Any, chance: Any) -> None:
    """Write the random numbers in [0, 1) of `count` entries from flat `position` on
    (methods/randomness.py) to `chance`.

    `words` is scratch (see `draw_words`), and `bits` the same memory as uint32.
    """
    first = draw_words(key, position, count, words)
    own = bits[first : first + count]
    for i in range(count):
        chance[i] = np.float32(np.int32(np.uint32(own[i] >> np.uint32(8)))) * np.float32(2.0**-24)


@compiled
def drop_tile(
    key: Any,
    position: Any,
    density: Any,
    divisor: Any,
    factor: Any,
    values: Any,
    count: int,
    words: Any,
    bits: Any,
    kept: Any,
) -> None:
    """Write to `kept` the entries of a tile, 0 where the random number (`draw_tile`) is not below
    `density`; divide, then multiply them.
    """
    one, zero = np.float32(1), np.float32(0)
    # The product with the inverse of a power of two is the quotient, and sooner there.
    mantissa, exponent = math.frexp(divisor)
    is_power = (mantissa == 0.5) & (abs(exponent) < 100)
    inverse = one / divisor
    if density < one:
        # A number is its upper 24 bits times 2⁻²⁴, so that it can be compared as the integer that
        # it is made of.
        limit = np.uint32(np.uint32(math.ceil(np.float64(density) * 2.0**24)) << np.uint32(8))
        first = draw_words(key, position, count, words)
        own = bits[first : first + count]
        if is_power:
            for i in range(count):
                kept[i] = select(own[i] < limit, values[i] * inverse, zero)
        else:
            for i in range(count):
                kept[i] = select(own[i] < limit, values[i] / divisor, zero)
    else:
        for i in range(count):
            kept[i] = values[i] / divisor
    if factor != one:
        for i in range(count):
            kept[i] = kept[i] * factor


@compiled
def cut_tile(values: Any, count: int, threshold: Any, ties: Any) -> Any:
    """Return the value from which on the entries of a tile belong to the largest, NaN where only
    some at the threshold do.

    Args:
        values: magnitudes or other float32 without sign.
        ties: int64, (how many at the threshold belong, how many were seen in the tiles before).
    """
    if ties[1] >= ties[0]:
        return np.nextafter(threshold, np.float32(np.inf))
    equal = np.int32(0)
    for i in range(count):
        equal = np.int32(equal + np.int32(values[i] == threshold))
    if ties[1] + equal <= ties[0]:
        ties[1] += equal
        return threshold
    return np.float32(np.nan)


@compiled
def top_tile(values: Any, count: int, threshold: Any, ties: Any, flags: Any) -> None:
    """Set `flags` (a tile of uint8) where an entry belongs to the largest: above `threshold`, or
    one of the first at it.

    Args:
        values, ties: see `cut_tile`; how many were seen is brought up to date as long as that
            matters.
    """
    cut = cut_tile(values, count, threshold, ties)
    for i in range(count, TILE_ENTRIES):
        flags[i] = 0
    if not np.isnan(cut):
        for i in range(count):
            flags[i] = values[i] >= cut
        return
    for i in range(count):
        if values[i] == threshold:
            flags[i] = ties[1] < ties[0]
            ties[1] += 1
        else:
            flags[i] = values[i] > threshold


@compiled
def locate_tile(
    kind: int, values: Any, count: int, numbers: Any, key: Any, position: Any, ties: Any, scratch: Any, words: Any, bits: Any, flags: Any,
    others: Any, located: Any,
) -> None:  # fmt: skip
    """Write a tile of one task vector to `located`, 0 where it is not located, and the rest
    rescaled.

    From one array to another: what stays where it was would be stored under a mask, which some
    processors do entry by entry.

    Args:
        kind: TRIM, DROP or TOP.
        numbers: float32 of this expert: TRIM (threshold); DROP (keep probability, divisor, factor);
            TOP (threshold of the larger count, threshold of the smaller count).
        ties: int64 (2, 2) of TOP, see `top_tile`.
        words, bits: see `draw_tile`.
    """
    zero = np.float32(0)
    if kind == TRIM:
        trim_tile(values, count, numbers[0], located)
    elif kind == DROP:
        drop_tile(
            key, position, numbers[0], numbers[1], numbers[2], values, count, words, bits, located
        )
    elif kind == TOP:
        for i in range(count):
            scratch[i] = abs(values[i])
        seen, seen_higher = ties[0, 1], ties[1, 1]
        low, high = (
            cut_tile(scratch, count, numbers[0], ties[0]),
            cut_tile(scratch, count, numbers[1], ties[1]),
        )
        if np.isnan(low) | np.isnan(high):
            ties[0, 1], ties[1, 1] = seen, seen_higher
            top_tile(scratch, count, numbers[0], ties[0], flags)
            top_tile(scratch, count, numbers[1], ties[1], others)
            for i in range(count):
                located[i] = select(flags[i] > others[i], values[i], zero)
        else:
            for i in range(count):
                magnitude = scratch[i]
                located[i] = select((magnitude >= low) & (magnitude < high), values[i], zero)


@compiled
def trim_tile(values: Any, count: int, threshold: Any, trimmed: Any) -> None:
    """Write a tile to `trimmed`, 0 where the magnitude is below the threshold."""
    zero = np.float32(0)
    for i in range(count):
        trimmed[i] = select(abs(values[i]) >= threshold, values[i], zero)


@compiled
def elect_three(
    deltas: Any,
    weights: Any,
    start: int,
    count: int,
    how: int,
    zero_sign: Any,
    total: Any,
    merged: Any,
    num_agreeing: Any,
) -> None:
    """Do what `elect_tile` does for three experts, by mean or sum, in one loop; add up in
    `num_agreeing` (int64) who agrees.
    """
    zero, one, infinite = np.float32(0), np.float32(1), np.float32(np.inf)
    first, second, third = (
        deltas[0][start : start + count],
        deltas[1][start : start + count],
        deltas[2][start : start + count],
    )
    weight_1, weight_2, weight_3 = weights[0], weights[1], weights[2]
    agreed_1, agreed_2, agreed_3 = np.int32(0), np.int32(0), np.int32(0)
    smallest = np.float32(1e-8) if how == ELECT_MEAN else infinite
    for i in range(count):
        value_1, value_2, value_3 = first[i], second[i], third[i]
        elected = value_1 + value_2 + value_3
        elected = select((elected > zero) | (elected < zero), elected, zero_sign)
        # With the sign turned by the elected one, who agrees is above 0; where nothing (or NaN) is
        # elected, nobody is above infinity.
        limit = select((elected > zero) | (elected < zero), zero, infinite)
        agrees_1 = turn_sign(value_1, elected) > limit
        agrees_2 = turn_sign(value_2, elected) > limit
        agrees_3 = turn_sign(value_3, elected) > limit
        found = (
            select(agrees_1, value_1, zero)
            + select(agrees_2, value_2, zero)
            + select(agrees_3, value_3, zero)
        )
        weight = (
            select(agrees_1, weight_1, zero)
            + select(agrees_2, weight_2, zero)
            + select(agrees_3, weight_3, zero)
        )
        merged[i] = found / select(abs(weight) < smallest, one, weight)
        total[i] = elected
        agreed_1 = np.int32(agreed_1 + np.int32(agrees_1))
        agreed_2 = np.int32(agreed_2 + np.int32(agrees_2))
        agreed_3 = np.int32(agreed_3 + np.int32(agrees_3))
    num_agreeing[0] += agreed_1
    num_agreeing[1] += agreed_2
    num_agreeing[2] += agreed_3


@compiled
def elect_tile(
    deltas: Any,
    weights: Any,
    start: int,
    count: int,
    how: int,
    zero_sign: Any,
    total: Any,
    merged: Any,
    agreeing: Any,
) -> None:
    """Elect the sign of weighted task vectors, from entry `start` of their rows, and write the
    disjoint merge to `merged`.

    `total` becomes the elected sign times something positive, 0 where nothing is elected.
    """
    zero, one = np.float32(0), np.float32(1)
    num_experts = deltas.shape[0]
    if num_experts == 3 and how != ELECT_MAX:
        elect_three(
            deltas, weights, start, count, how, zero_sign, total, merged, np.zeros(3, np.int64)
        )
        return
    first = deltas[0][start : start + count]
    for i in range(count):
        total[i] = first[i]
        merged[i] = zero
        agreeing[i] = zero
    for expert in range(1, num_experts):
        delta = deltas[expert][start : start + count]
        for i in range(count):
            total[i] = total[i] + delta[i]
    if zero_sign != zero:
        for i in range(count):
            value = total[i]
            total[i] = value if (value > zero) | (value < zero) else zero_sign
    for expert in range(num_experts):
        delta, weight = deltas[expert][start : start + count], weights[expert]
        if how == ELECT_MAX:
            for i in range(count):
                value, elected = delta[i], total[i]
                agrees = ((value > zero) & (elected > zero)) | ((value < zero) & (elected < zero))
                magnitude = abs(value) if agrees else zero
                merged[i] = magnitude if magnitude > merged[i] else merged[i]
        else:
            for i in range(count):
                value, elected = delta[i], total[i]
                agrees = ((value > zero) & (elected > zero)) | ((value < zero) & (elected < zero))
                merged[i] = merged[i] + (value if agrees else zero)
                agreeing[i] = agreeing[i] + (weight if agrees else zero)
    if how == ELECT_MAX:
        for i in range(count):
            elected = total[i]
            merged[i] = merged[i] * (one if elected > zero else (-one if elected < zero else zero))
    elif how == ELECT_MEAN:
        for i in range(count):
            weight = agreeing[i]
            merged[i] = merged[i] / (one if abs(weight) < np.float32(1e-8) else weight)


@compiled
def put_together(
    deltas: Any,
    weights: Any,
    start: int,
    count: int,
    how: int,
    zero_sign: Any,
    divisor: Any,
    scale: Any,
    base: Any,
    tiles: Any,
) -> Any:
    """Return a tile of θ₀ + scale·F(…): F sums or elects located, weighted task vectors, from entry
    `start` of their rows.

    Args:
        divisor: of the sum; 1 leaves it as it is.
        base: a tile of θ₀.
        tiles: float32 (3, TILE_ENTRIES), scratch; the result is one of them.
    """
    total, merged, agreeing = tiles[0], tiles[1], tiles[2]
    if how == SUM:
        first = deltas[0][start : start + count]
        for i in range(count):
            merged[i] = first[i]
        for expert in range(1, deltas.shape[0]):
            delta = deltas[expert][start : start + count]
            for i in range(count):
                merged[i] = merged[i] + delta[i]
        if divisor != np.float32(1):
            for i in range(count):
                merged[i] = merged[i] / divisor
    else:
        elect_tile(deltas, weights, start, count, how, zero_sign, total, merged, agreeing)
    for i in range(count):
        merged[i] = base[i] + scale * merged[i]
    return merged


@compiled
def merge_located(
    inputs: Any, codes: Any, num_entries: int, position: Any, kinds: Any, numbers: Any, keys: Any, ties: Any, weights: Any, how: int,
    zero_sign: Any, divisor: Any, scale: Any, out_code: int, out: Any,
) -> None:  # fmt: skip
    """Write θ₀ + scale·F(Sub(τ₁), …) of one block to `out` (bytes): inputs say where rows of bytes
    begin, base first.

    Args:
        position: uint64, flat position of the block's first entry in the whole tensor.
        kinds: int64 per expert, how it is located; numbers, keys (uint64), ties: see `locate_tile`.
        weights: float32 per expert.
    """
    num_experts = inputs.shape[0] - 1
    tiles = np.empty((5, TILE_ENTRIES), np.float32)
    base, scratch, rest = tiles[0], tiles[1], tiles[2:]
    flags = np.zeros((2, TILE_ENTRIES), np.uint8)
    words = np.empty(TILE_ENTRIES // 2 + 1, np.uint64)
    bits = words.view(np.uint32)
    deltas = np.empty((num_experts, TILE_ENTRIES), np.float32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(num_experts):
            delta, weight, kind = deltas[expert], weights[expert], kinds[expert]
            whole = delta if kind == KEEP_ALL else rest[0]
            subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, whole)
            if kind != KEEP_ALL:
                locate_tile(
                    kind, whole, count, numbers[expert], keys[expert], position + np.uint64(start), ties[expert], scratch, words, bits, flags[0],
                    flags[1], delta,
                )  # fmt: skip
            if weight != np.float32(1):
                for i in range(count):
                    delta[i] = weight * delta[i]
        merged = put_together(deltas, weights, 0, count, how, zero_sign, divisor, scale, base, rest)
        narrow(merged, out_code, count, out, start)
