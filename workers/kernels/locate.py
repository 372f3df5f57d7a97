"""Locate, then merge, in one pass over a block: what of each task vector is kept, and the weighted
sum or sign election of it.

What the rules mean, and their definition in torch: workers/methods/locate_rules.py and
combine_rules.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    compiled,
    narrow,
    select,
    subtract_at,
    widen_at,
)
from mmerge.workers.kernels.unrolled import (
    add_agreeing,
    cut_rows,
    largest_agreeing,
    sum_agreeing,
    sum_agreeing_weights,
    sum_rows,
    zero_counts,
)

KEEP_ALL, TRIM, DROP, TOP, DROP_BY_RANK = 0, 1, 2, 3, 4
"""Kinds of locate rules."""
SUM, ELECT_MEAN, ELECT_SUM, ELECT_MAX = 0, 1, 2, 3
"""Kinds of combine rules."""

LOCATE_RULE = np.dtype(
    [
        ("kind", np.int64),
        ("threshold", np.float32),  # TRIM, TOP: smallest magnitude that is kept
        ("upper_threshold", np.float32),  # TOP: magnitudes from here on are dropped
        ("density", np.float32),  # DROP, DROP_BY_RANK: (mean) probability of keeping
        ("lowest", np.float32),  # DROP_BY_RANK: probability of a row's smallest magnitude
        ("span", np.float32),  # DROP_BY_RANK: probability of the largest, less the lowest
        ("divides", np.bool_),  # DROP_BY_RANK: divide by the probability
        ("divisor", np.float32),  # DROP: divides what is kept
        ("factor", np.float32),  # DROP, DROP_BY_RANK: multiplies what is kept
        ("key", np.uint64),  # DROP, DROP_BY_RANK: of the random numbers
    ],
    align=True,
)
"""How one expert's task vector is located: an array of these has one element per expert. An array,
not a tuple of records, since the kinds of the experts may differ."""

TIES = np.dtype([("belonging", np.int64), ("seen", np.int64)], align=True)
"""Entries at a threshold of TOP: how many of them belong to the largest, and how many were seen in
the tiles before. Kernels keep `seen` up to date."""


class CombineRecord(NamedTuple):
    """How located task vectors are combined."""

    kind: int
    weights: tuple[np.float32, ...]
    """Per expert. A tuple: its length, the number of experts, is known when a kernel is compiled.
    """
    zero_sign: np.float32
    """The sign that an exact zero sum elects, 0 for none."""
    divisor: np.float32
    """Divides a weighted sum; 1 leaves it as it is."""
    scale: np.float32
    """Multiplies the merged task vector."""


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
    drawn = bits[first : first + count]
    for i in range(count):
        chance[i] = np.float32(np.int32(np.uint32(drawn[i] >> np.uint32(8)))) * np.float32(2.0**-24)


@compiled
def drop_tile(
    rule: Any, position: Any, values: Any, count: int, words: Any, bits: Any, kept: Any
) -> None:
    """Write to `kept` the entries of a tile, 0 where the random number (`draw_tile`) is not below
    the rule's density; divide, then multiply them.
    """
    unit, zero = np.float32(1), np.float32(0)
    divisor, factor = rule.divisor, rule.factor
    # The product with the inverse of a power of two is the quotient, and faster.
    mantissa, exponent = math.frexp(divisor)
    is_power = (mantissa == 0.5) & (abs(exponent) < 100)
    inverse = unit / divisor
    if rule.density < unit:
        # A random number is its upper 24 bits times 2⁻²⁴: it is compared as that integer, which
        # saves the conversion to float32.
        limit = np.uint32(np.uint32(math.ceil(np.float64(rule.density) * 2.0**24)) << np.uint32(8))
        first = draw_words(rule.key, position, count, words)
        drawn = bits[first : first + count]
        if is_power:
            for i in range(count):
                kept[i] = select(drawn[i] < limit, values[i] * inverse, zero)
        else:
            for i in range(count):
                kept[i] = select(drawn[i] < limit, values[i] / divisor, zero)
    else:
        for i in range(count):
            kept[i] = values[i] / divisor
    if factor != unit:
        for i in range(count):
            kept[i] = kept[i] * factor


@compiled
def cut_tile(values: Any, count: int, threshold: Any, ties: Any) -> Any:
    """Return the value from which on the entries of a tile belong to the largest, NaN where only
    some at the threshold do.

    Args:
        values: magnitudes or other float32 without sign.
        ties: record of TIES.
    """
    if ties.seen >= ties.belonging:
        return np.nextafter(threshold, np.float32(np.inf))
    equal = np.int32(0)
    for i in range(count):
        equal = np.int32(equal + np.int32(values[i] == threshold))
    if ties.seen + equal <= ties.belonging:
        ties.seen += equal
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
            flags[i] = ties.seen < ties.belonging
            ties.seen += 1
        else:
            flags[i] = values[i] > threshold


@compiled
def locate_tile(
    rule: Any,
    ties: Any,
    values: Any,
    count: int,
    position: Any,
    buffers: Any,
    located: Any,
) -> None:
    """Write a tile of one task vector to `located`, 0 where it is not located, and the rest
    rescaled.

    From one array to another: an entry that stays in place would be stored under a mask, which
    some processors do entry by entry.

    Args:
        rule: record of LOCATE_RULE, of kind TRIM, DROP or TOP.
        ties: TIES at the lower and at the upper threshold of TOP.
        position: uint64, flat position of the first entry in the whole tensor.
        buffers: LocateBuffers.
    """
    zero = np.float32(0)
    if rule.kind == TRIM:
        trim_tile(values, count, rule.threshold, located)
    elif rule.kind == DROP:
        drop_tile(rule, position, values, count, buffers.words, buffers.bits, located)
    elif rule.kind == TOP:
        magnitudes, flags, upper_flags = buffers.magnitudes, buffers.flags, buffers.upper_flags
        for i in range(count):
            magnitudes[i] = abs(values[i])
        seen, upper_seen = ties[0].seen, ties[1].seen
        low = cut_tile(magnitudes, count, rule.threshold, ties[0])
        high = cut_tile(magnitudes, count, rule.upper_threshold, ties[1])
        if np.isnan(low) | np.isnan(high):
            # A count ends within the equal magnitudes of this tile: entry by entry, from the start.
            ties[0].seen, ties[1].seen = seen, upper_seen
            top_tile(magnitudes, count, rule.threshold, ties[0], flags)
            top_tile(magnitudes, count, rule.upper_threshold, ties[1], upper_flags)
            for i in range(count):
                located[i] = select(flags[i] > upper_flags[i], values[i], zero)
        else:
            for i in range(count):
                magnitude = magnitudes[i]
                located[i] = select((magnitude >= low) & (magnitude < high), values[i], zero)


class LocateBuffers(NamedTuple):
    """Scratch memory of `locate_tile`."""

    magnitudes: Any
    flags: Any
    upper_flags: Any
    words: Any
    """uint64, see `draw_words`."""
    bits: Any
    """The memory of `words` as uint32."""


@compiled
def make_locate_buffers() -> Any:
    """Return new LocateBuffers."""
    flags = np.zeros((2, TILE_ENTRIES), np.uint8)
    words = np.empty(TILE_ENTRIES // 2 + 1, np.uint64)
    magnitudes = np.empty(TILE_ENTRIES, np.float32)
    return LocateBuffers(magnitudes, flags[0], flags[1], words, words.view(np.uint32))


@compiled
def trim_tile(values: Any, count: int, threshold: Any, trimmed: Any) -> None:
    """Write a tile to `trimmed`, 0 where the magnitude is below the threshold."""
    zero = np.float32(0)
    for i in range(count):
        trimmed[i] = select(abs(values[i]) >= threshold, values[i], zero)


@compiled
def combine_tile(rows: Any, rule: Any, count: int, total: Any, merged: Any) -> Any:
    """Write F(…) of a tile of located, weighted task vectors to `merged`; return per expert how
    many entries agree with the elected sign (int32; with a sum, nothing is elected and counted).

    All kinds are one loop over entries (see `unrolled`), so that what is summed stays in registers.

    Args:
        rows: tuple of float32 arrays, one per expert.
        rule: CombineRecord.
        total: becomes the elected sign times something positive, 0 where nothing is elected; left
            as it is by a sum.
    """
    zero, unit, infinite = np.float32(0), np.float32(1), np.float32(np.inf)
    weights, zero_sign = rule.weights, rule.zero_sign
    counts = zero_counts(weights)
    if rule.kind == SUM:
        if rule.divisor != unit:
            for i in range(count):
                merged[i] = sum_rows(rows, i) / rule.divisor
        else:
            for i in range(count):
                merged[i] = sum_rows(rows, i)
        return counts
    if rule.kind == ELECT_MAX:
        for i in range(count):
            elected = sum_rows(rows, i)
            elected = select((elected > zero) | (elected < zero), elected, zero_sign)
            limit = select((elected > zero) | (elected < zero), zero, infinite)
            sign = select(elected > zero, unit, select(elected < zero, -unit, zero))
            merged[i] = largest_agreeing(rows, i, elected, limit) * sign
            total[i] = elected
            counts = add_agreeing(counts, rows, i, elected, limit)
        return counts
    # The mean divides by the weights that agree, by 1 where they are (nearly) 0; the sum always
    # by 1, since no weight is above infinity.
    smallest = np.float32(1e-8) if rule.kind == ELECT_MEAN else infinite
    for i in range(count):
        elected = sum_rows(rows, i)
        elected = select((elected > zero) | (elected < zero), elected, zero_sign)
        limit = select((elected > zero) | (elected < zero), zero, infinite)
        weight = sum_agreeing_weights(rows, weights, i, elected, limit)
        weight = select(abs(weight) < smallest, unit, weight)
        merged[i] = sum_agreeing(rows, i, elected, limit) / weight
        total[i] = elected
        counts = add_agreeing(counts, rows, i, elected, limit)
    return counts


@compiled
def merge_located(
    inputs: Any,
    codes: Any,
    num_entries: int,
    position: Any,
    rules: Any,
    ties: Any,
    combination: Any,
    out_code: int,
    out: Any,
) -> None:
    """Write θ₀ + scale·F(Sub(τ₁), …) of one block to `out` (bytes).

    Args:
        inputs: int64, addresses of the rows of bytes, base first.
        codes: int64, the dtypes of the rows.
        position: uint64, flat position of the block's first entry in the whole tensor.
        rules: LOCATE_RULE per expert.
        ties: TIES (experts, 2), see `locate_tile`.
        combination: CombineRecord.
    """
    weights, scale = combination.weights, combination.scale
    num_experts = len(weights)
    tiles = np.empty((4, TILE_ENTRIES), np.float32)
    base, whole, total, merged = tiles[0], tiles[1], tiles[2], tiles[3]
    buffers = make_locate_buffers()
    deltas = np.empty((num_experts, TILE_ENTRIES), np.float32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(num_experts):
            delta, rule, weight = deltas[expert], rules[expert], weights[expert]
            values = delta if rule.kind == KEEP_ALL else whole
            subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, values)
            if rule.kind != KEEP_ALL:
                first = position + np.uint64(start)
                locate_tile(rule, ties[expert], values, count, first, buffers, delta)
            if weight != np.float32(1):
                for i in range(count):
                    delta[i] = weight * delta[i]
        combine_tile(cut_rows(deltas, weights, 0, count), combination, count, total, merged)
        for i in range(count):
            merged[i] = base[i] + scale * merged[i]
        narrow(merged, out_code, count, out, start)
