"""Reconstruct weights on the CPU: base + (Σ factorⱼ·mⱼ / divisor)·delta from packed bits.

Two loops, with the same bits: one for bfloat16 and small whole factors, the case of every MMER
composite, and one for any dtypes and factors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    compiled,
    from_bits,
    narrow,
    select,
    to_bits,
    widen,
)

CHUNK_ENTRIES = 8 * TILE_ENTRIES
"""Entries whose bits are counted together: one chunk of 32 KB in bfloat16 stays in the L1 cache."""
BFLOAT16 = 1
"""Its code in `tiles.CODES`."""


@compiled
def add_masked_rows(
    base: Any,
    base_code: int,
    delta: Any,
    delta_code: int,
    masks: Any,
    factors: Any,
    divisor: Any,
    out: Any,
    out_code: int,
    width: int,
) -> None:
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)·delta to `out`, row by row.

    Computed in float32, rounded once; `out` may be `base`, of the same dtype.

    How it is fast: with small whole factors the sum Σ factorsⱼ·mⱼ fits in a byte, so eight entries
    are summed at once in the bytes of a 64-bit word, by one table lookup per expert and byte of
    bits. Where 1/divisor is exact for every possible sum, the division becomes a product. Bits are
    summed for several tiles in a row, because the hardware prefetcher follows a reader that stays
    on one stream for some cache lines.

    Args:
        base, delta, out: bytes, uint8 [rows, bytes of `width` entries].
        base_code, delta_code, out_code: their dtypes, see `tiles.CODES`.
        masks: packed bits, uint8 [experts, rows, bytes], the first entry in the highest bit.
        factors: float32 [experts].
        divisor: float32.
        width: entries of a row.
    """
    bits = np.empty(CHUNK_ENTRIES // 8, np.uint64)
    counts = bits.view(np.uint8)
    values = np.empty(TILE_ENTRIES, np.float32)
    change = np.empty(TILE_ENTRIES, np.float32)
    weights = np.empty(CHUNK_ENTRIES, np.float32)
    are_small = _are_small(factors)
    tables = _tabulate(factors) if are_small else np.empty((0, 256), np.uint64)
    surplus = _surplus(factors) if are_small else np.int32(0)
    inverse = _exact_inverse(factors, divisor) if are_small else np.float32(0)
    is_in_place = base.ctypes.data == out.ctypes.data
    is_bfloat16 = base_code == BFLOAT16 and out_code == BFLOAT16 and delta_code == BFLOAT16
    for row in range(out.shape[0]):
        for begin in range(0, width, CHUNK_ENTRIES):
            length = min(CHUNK_ENTRIES, width - begin)
            for expert in range(factors.shape[0]):
                packed = masks[expert, row, begin // 8 : (begin + length + 7) // 8]
                if are_small:
                    _count(packed, tables[expert], expert == 0, bits)
                else:
                    _spread(packed, bits)
                    _add(counts, factors[expert], expert == 0, length, weights)
            if is_bfloat16 and inverse != np.float32(0):
                chunk = slice(begin, begin + length)
                values16 = out[row].view(np.uint16)[chunk]
                delta16 = delta[row].view(np.uint16)[chunk]
                if is_in_place:
                    _combine_bfloat16_in_place(values16, delta16, counts, surplus, inverse)
                else:
                    base16 = base[row].view(np.uint16)[chunk]
                    _combine_bfloat16(base16, delta16, counts, surplus, inverse, values16)
                continue
            for start in range(0, length, TILE_ENTRIES):
                count = min(TILE_ENTRIES, length - start)
                tile = slice(start, start + count)
                widen(base[row], base_code, begin + start, count, values)
                widen(delta[row], delta_code, begin + start, count, change)
                if are_small:
                    _to_weights(counts[tile], count, surplus, weights[tile])
                _combine(values, weights[tile], divisor, change, count)
                narrow(values, out_code, count, out[row], begin + start)


@compiled
def _combine_bfloat16(
    base: Any, delta: Any, counts: Any, surplus: Any, inverse: Any, out: Any
) -> None:
    """Widen, combine and round one chunk in one loop whose values stay in registers.

    The arrays are bfloat16 as uint16, `base` and `out` different memory.
    """
    counts = counts[: out.shape[0]]
    for i in range(out.shape[0]):
        out[i] = _to_bfloat16(base[i], delta[i], counts[i], surplus, inverse)


@compiled
def _combine_bfloat16_in_place(
    values: Any, delta: Any, counts: Any, surplus: Any, inverse: Any
) -> None:
    """Do the same where `out` is `base`: between two names for it LLVM could not vectorise."""
    counts = counts[: values.shape[0]]
    for i in range(values.shape[0]):
        values[i] = _to_bfloat16(values[i], delta[i], counts[i], surplus, inverse)


@compiled
def _to_bfloat16(base: Any, delta: Any, count: Any, surplus: Any, inverse: Any) -> Any:
    # Each step is cast: sums of 32-bit integers become 64 bits wide and halve the vectors.
    value = from_bits(np.uint32(np.uint32(base) << np.uint32(16)))
    change = from_bits(np.uint32(np.uint32(delta) << np.uint32(16)))
    weight = np.float32(np.int32(np.int32(count) - surplus)) * inverse
    total = np.float32(value + weight * change)
    word = to_bits(total)
    odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(word + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(select(np.isnan(total), np.uint32(0x7FC0), rounded))


@compiled
def _to_weights(counts: Any, count: int, surplus: Any, weights: Any) -> None:
    for i in range(count):
        weights[i] = np.float32(np.int32(np.int32(counts[i]) - surplus))


@compiled
def _combine(values: Any, weights: Any, divisor: Any, change: Any, count: int) -> None:
    for i in range(count):
        values[i] = values[i] + (weights[i] / divisor) * change[i]


@compiled
def _are_small(factors: Any) -> bool:
    """Return whether the factors are whole and their magnitudes add up to at most 255.

    That holds for masks without factors of their own (MMER, TALL).
    """
    total = np.float32(0)
    for factor in factors:
        if factor != np.floor(factor):
            return False
        total += abs(factor)
    return bool(total <= np.float32(255))


@compiled
def _surplus(factors: Any) -> Any:
    """Return the offset of the sums of `_count`: Σ f over the negative factors −f.

    A factor −f adds f where the bit is 0, instead of −f where it is 1, so that no sum is negative.
    """
    total = np.int32(0)
    for factor in factors:
        if factor < np.float32(0):
            total = np.int32(total + np.int32(-factor))
    return total


@compiled
def _exact_inverse(factors: Any, divisor: Any) -> Any:
    """Return 1 / divisor if its product with every possible sum equals the quotient, else 0."""
    inverse = np.float32(1) / divisor
    surplus = _surplus(factors)
    for number in range(-surplus, int(np.abs(factors).sum()) - surplus + 1):
        if np.float32(number) * inverse != np.float32(number) / divisor:
            return np.float32(0)
    return inverse


@compiled
def _tabulate(factors: Any) -> Any:
    """Return the tables of `_count`, uint64 [experts, 256].

    For each factor and each byte of bits: the word whose eight bytes hold the terms of eight
    entries, see `_surplus`.
    """
    tables = np.empty((factors.shape[0], 256), np.uint64)
    bits, words = np.arange(256).astype(np.uint8), np.empty(256, np.uint64)
    _spread(bits, words)
    for expert in range(factors.shape[0]):
        magnitude, is_negative = np.uint64(abs(factors[expert])), factors[expert] < np.float32(0)
        for i in range(256):
            counted = words[i] ^ np.uint64(0x0101010101010101) if is_negative else words[i]
            tables[expert, i] = counted * magnitude
    return tables


@compiled
def _spread(packed: Any, words: Any) -> None:
    """Write each byte of bits as a word of eight bytes, 0 or 1."""
    for i in range(packed.shape[0]):
        # The product moves bit 7 − k of the byte to bit 7 of byte k, and no other bit there.
        words[i] = (
            (np.uint64(packed[i]) * np.uint64(0x8040201008040201)) >> np.uint64(7)
        ) & np.uint64(0x0101010101010101)


@compiled
def _count(packed: Any, table: Any, is_first: bool, sums: Any) -> None:
    """Add the terms of one factor to `sums`, eight entries per word.

    `table` is that factor's row of `_tabulate`. A lookup is faster than the product of `_spread`,
    which takes three instructions per word, and more on processors without 64-bit vector products.
    """
    if is_first:
        for i in range(packed.shape[0]):
            sums[i] = table[packed[i]]
    else:
        for i in range(packed.shape[0]):
            sums[i] = sums[i] + table[packed[i]]


@compiled
def _add(flags: Any, factor: Any, is_first: bool, count: int, weights: Any) -> None:
    if is_first:
        for i in range(count):
            weights[i] = factor * np.float32(flags[i])
    else:
        for i in range(count):
            weights[i] += factor * np.float32(flags[i])
