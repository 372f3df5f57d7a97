"""A modality's weights formed straight from packed bits: base + (Σ cⱼmⱼ / d)∘τ⋆, in one pass over
the bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, types
from numpy.lib.stride_tricks import as_strided

from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    bytes_at,
    called_back,
    compiled,
    from_bits,
    narrow,
    select,
    take_number,
    to_bits,
    widen,
)

CHUNK_ENTRIES = 8 * TILE_ENTRIES
"""Entries whose bits are counted at once."""
NUM_ARGUMENTS = 15
"""What `form_parts` is given."""


@compiled
def form_rows(
    base: Any, base_code: int, delta: Any, delta_code: int, masks: Any, factors: Any, divisor: Any, out: Any, out_code: int, width: int,
    is_in_place: bool,
) -> None:  # fmt: skip
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)·delta, row by row.

    `base`, `delta` and `out` are bytes [rows, …] of `width` entries a row; `masks` are packed bits
    [experts, rows, …], the first entry in the most significant bit; `factors` and `divisor` are
    float32. Computed in float32, rounded once. `is_in_place` says that `out` is `base`.
    """
    bits = np.empty(CHUNK_ENTRIES // 8, np.uint64)
    counts = bits.view(np.uint8)
    values, change, share = (
        np.empty(TILE_ENTRIES, np.float32),
        np.empty(TILE_ENTRIES, np.float32),
        np.empty(CHUNK_ENTRIES, np.float32),
    )
    are_small = _are_small(factors)
    tables = _tabulate(factors) if are_small else np.empty((0, 256), np.uint64)
    surplus = _surplus(factors) if are_small else np.int32(0)
    inverse = _exact_inverse(factors, divisor) if are_small else np.float32(0)
    is_exact = inverse != np.float32(0)
    is_bfloat16, is_float32 = (
        base_code == 1 and out_code == 1 and delta_code == 1,
        base_code == 0 and out_code == 0 and delta_code == 1,
    )
    for row in range(out.shape[0]):
        for begin in range(0, width, CHUNK_ENTRIES):
            # Bits of several tiles at once: a cache fetches ahead of a reader that stays on one row
            # for some lines.
            length = min(CHUNK_ENTRIES, width - begin)
            for expert in range(factors.shape[0]):
                packed = masks[expert, row, begin // 8 : (begin + length + 7) // 8]
                if are_small:
                    _count(packed, tables[expert], expert == 0, bits)
                else:
                    _spread(packed, bits)
                    _add(bits.view(np.uint8), factors[expert], expert == 0, length, share)
            if is_exact and (is_bfloat16 or is_float32):
                where = slice(begin, begin + length)
                change_words = delta[row].view(np.uint16)[where]
                if is_float32:
                    _combine_float32(
                        base[row].view(np.float32)[where],
                        change_words,
                        counts,
                        surplus,
                        inverse,
                        out[row].view(np.float32)[where],
                    )
                elif is_in_place:
                    _combine_bfloat16_in_place(
                        out[row].view(np.uint16)[where], change_words, counts, surplus, inverse
                    )
                else:
                    _combine_bfloat16(
                        base[row].view(np.uint16)[where],
                        change_words,
                        counts,
                        surplus,
                        inverse,
                        out[row].view(np.uint16)[where],
                    )
                continue
            for start in range(0, length, TILE_ENTRIES):
                count = min(TILE_ENTRIES, length - start)
                widen(base[row], base_code, begin + start, count, values)
                widen(delta[row], delta_code, begin + start, count, change)
                if are_small:
                    _to_share(
                        counts[start : start + count], count, surplus, share[start : start + count]
                    )
                _combine(values, share[start : start + count], divisor, change, count)
                narrow(values, out_code, count, out[row], begin + start)


@compiled
def _combine_bfloat16(
    base: Any, delta: Any, counts: Any, surplus: Any, inverse: Any, out: Any
) -> None:
    """Widen, combine and narrow as the tiles do, in one loop whose values stay in registers; all
    three are bfloat16 as uint16.
    """
    counts = counts[: out.shape[0]]
    for i in range(out.shape[0]):
        out[i] = _form_bfloat16(base[i], delta[i], counts[i], surplus, inverse)


@compiled
def _combine_bfloat16_in_place(
    values: Any, delta: Any, counts: Any, surplus: Any, inverse: Any
) -> None:
    """The same where the result replaces `base`. Of two arrays that are one the compiled loop would
    have to assume the worst.
    """
    counts = counts[: values.shape[0]]
    for i in range(values.shape[0]):
        values[i] = _form_bfloat16(values[i], delta[i], counts[i], surplus, inverse)


@compiled
def _form_bfloat16(base: Any, delta: Any, count: Any, surplus: Any, inverse: Any) -> Any:
    # Each step is cast: integers of 32 bits that meet become 64 wide, and halve the vectors.
    value = from_bits(np.uint32(np.uint32(base) << np.uint32(16)))
    change = from_bits(np.uint32(np.uint32(delta) << np.uint32(16)))
    formed = np.float32(
        value + (np.float32(np.int32(np.int32(count) - surplus)) * inverse) * change
    )
    word = to_bits(formed)
    odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(word + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(select(np.isnan(formed), np.uint32(0x7FC0), rounded))


@compiled
def _combine_float32(
    base: Any, delta: Any, counts: Any, surplus: Any, inverse: Any, out: Any
) -> None:
    """The same of float32 and a bfloat16 `delta`, for models that are computed in float32. `out`
    may be `base`.
    """
    counts = counts[: out.shape[0]]
    for i in range(out.shape[0]):
        change = from_bits(np.uint32(np.uint32(delta[i]) << np.uint32(16)))
        out[i] = base[i] + (np.float32(np.int32(np.int32(counts[i]) - surplus)) * inverse) * change


@compiled
def _to_share(counts: Any, count: int, surplus: Any, share: Any) -> None:
    for i in range(count):
        share[i] = np.float32(np.int32(np.int32(counts[i]) - surplus))


@compiled
def _combine(values: Any, share: Any, divisor: Any, change: Any, count: int) -> None:
    for i in range(count):
        values[i] = values[i] + (share[i] / divisor) * change[i]


@compiled
def _are_small(factors: Any) -> bool:
    """Return whether the sum of the factors' magnitudes is a whole number of a byte: of masks
    without factors of their own.
    """
    total = np.float32(0)
    for factor in factors:
        if factor != np.floor(factor):
            return False
        total += abs(factor)
    return bool(total <= np.float32(255))


@compiled
def _surplus(factors: Any) -> Any:
    """Return what sums of `_count` have too much: a factor −f counts f where the bit is 0, so that
    nothing is below 0.
    """
    total = np.int32(0)
    for factor in factors:
        if factor < np.float32(0):
            total = np.int32(total + np.int32(-factor))
    return total


@compiled
def _exact_inverse(factors: Any, divisor: Any) -> Any:
    """Return 1 / divisor where its product with any sum of small factors is the quotient, bit by
    bit; else 0.
    """
    inverse = np.float32(1) / divisor
    surplus = _surplus(factors)
    for number in range(-surplus, int(np.abs(factors).sum()) - surplus + 1):
        if np.float32(number) * inverse != np.float32(number) / divisor:
            return np.float32(0)
    return inverse


@compiled
def _tabulate(factors: Any) -> Any:
    """Return, for each small factor and each byte of bits, the word whose bytes hold what `_count`
    adds: see `_surplus`.
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
        # Byte k of the word becomes bit 7 − k: the product brings it to bit 7 of that byte, and
        # nothing else there.
        words[i] = (
            (np.uint64(packed[i]) * np.uint64(0x8040201008040201)) >> np.uint64(7)
        ) & np.uint64(0x0101010101010101)


@compiled
def _count(packed: Any, table: Any, is_first: bool, sums: Any) -> None:
    """Add a small factor to the bytes of `sums` where the bit is 1 (where it is 0, if negative),
    eight entries a word; `table` is its.

    Looked up: the product that spreads bits takes three instructions per word on the processors
    that have it, and more on others.
    """
    if is_first:
        for i in range(packed.shape[0]):
            sums[i] = table[packed[i]]
    else:
        for i in range(packed.shape[0]):
            sums[i] = sums[i] + table[packed[i]]


@compiled
def _add(flags: Any, factor: Any, is_first: bool, count: int, share: Any) -> None:
    if is_first:
        for i in range(count):
            share[i] = factor * np.float32(flags[i])
    else:
        for i in range(count):
            share[i] += factor * np.float32(flags[i])


@compiled
def form_parts(arguments: Any) -> None:
    """Form rows of a matrix, some at a time, until other threads and this one have formed all.

    Args:
        arguments: int64 [NUM_ARGUMENTS]: the address of a counter that begins at 0, rows, rows of a
            part, width; address and code of base, of delta and of the result; address of the masks,
            bytes from one expert's to the next, and how many; addresses of the float32 factors and
            of their divisor. See `form_rows`; rows of each lie behind each other.
    """
    rows, step, width = arguments[1], arguments[2], arguments[3]
    num_experts = arguments[12]
    factors, divisor = (
        bytes_at(arguments[13], 4 * num_experts).view(np.float32),
        bytes_at(arguments[14], 4).view(np.float32)[0],
    )
    packed_width = (width + 7) // 8
    while True:
        start = take_number(arguments[0]) * step
        if start >= rows:
            return
        count = min(step, rows - start)
        # Rows that end on whole bytes of bits are one long row: fewer, fuller tiles.
        height, length = (1, count * width) if width % 8 == 0 else (count, width)
        row_bytes = count * packed_width // height
        first = bytes_at(arguments[10] + start * packed_width, count * packed_width)
        masks = as_strided(first, (num_experts, height, row_bytes), (arguments[11], row_bytes, 1))
        base = _rows_at(arguments[4], arguments[5], start * width, height, length)
        delta = _rows_at(arguments[6], arguments[7], start * width, height, length)
        out = _rows_at(arguments[8], arguments[9], start * width, height, length)
        form_rows(
            base,
            arguments[5],
            delta,
            arguments[7],
            masks,
            factors,
            divisor,
            out,
            arguments[9],
            length,
            False,
        )


@compiled
def _rows_at(address: int, code: int, start: int, height: int, length: int) -> Any:
    """Return the bytes of rows of a dtype, uint8 [height, …], from entry `start` on."""
    width = 4 if code == 0 else 2
    return bytes_at(address + start * width, height * length * width).reshape(
        (height, length * width)
    )


def _enter(arguments: Any) -> None:
    form_parts(carray(arguments, NUM_ARGUMENTS, np.int64))


@cache
def find_entry() -> int:
    """Return the address of a C function that calls `form_parts` with the arguments that its
    pointer points to.
    """
    return int(called_back(_enter, types.void(types.voidptr)).address)
