"""First value of a block that overflows float16 where a composite forms θ₀ + τ⋆.

float16 ends at 65,504. Sums of task vectors pass that where bfloat16 and float32 would not, so
written blocks are looked through once, while they lie in a cache; other dtypes are not.
"""

from __future__ import annotations

import numpy as np

from mmerge.workers.kernels.tiles import TILE_ENTRIES, bytes_at, compiled, to_bits, widen, widen_at

OVERFLOW = 65520.0
"""The smallest magnitude that rounds to infinity in float16."""
OVERFLOW_BITS = 0x477FF000
"""The same as float32 bits."""


@compiled
def first_sum_overflow(
    base_address: int, base_code: int, delta_address: int, num_entries: int
) -> int:
    """Return the position of the first entry whose θ₀ + τ⋆ overflows float16, −1 where none does.

    A composite forms θ₀ + m∘τ⋆ with m in [0, 1], which lies between θ₀ and θ₀ + τ⋆. NaN counts as
    an overflow: it arises from an infinite τ⋆.

    Args:
        base_address: where the bytes of θ₀ begin, of the dtype `base_code`.
        delta_address: where the bytes of τ⋆ begin, float16.
        num_entries: entries of the block.
    """
    base = np.empty(TILE_ENTRIES, np.float32)
    delta = np.empty(TILE_ENTRIES, np.float32)
    limit = np.uint32(OVERFLOW_BITS)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        # Hardly any tile comes near the limit: the sum of the largest magnitudes rules it out at a
        # sixth of the time that widening and adding take.
        bound = largest_magnitude(base_address, base_code, start, count)
        bound += largest_magnitude(delta_address, 2, start, count)
        if bound < np.float32(OVERFLOW):
            continue
        widen_at(base_address, base_code, start, count, base)
        widen_at(delta_address, 2, start, count, delta)
        for i in range(count):
            if np.uint32(to_bits(base[i] + delta[i]) & np.uint32(0x7FFFFFFF)) >= limit:
                return start + i
    return -1


@compiled
def largest_magnitude(address: int, code: int, start: int, count: int) -> float:
    """Return the largest magnitude of `count` entries from entry `start`; NaN where there is one.

    Magnitudes are compared as integers: the loop has no branch and becomes vector code, and NaN
    counts as larger than any number.
    """
    value = np.empty(1, np.float32)
    if code == 0:
        words = bytes_at(address + start * 4, count * 4).view(np.uint32)
        largest = np.uint32(0)
        for i in range(count):
            largest = max(largest, np.uint32(words[i] & np.uint32(0x7FFFFFFF)))
        value.view(np.uint32)[0] = largest
    else:
        halves = bytes_at(address + start * 2, count * 2).view(np.uint16)
        most = np.uint16(0)
        for i in range(count):
            most = max(most, np.uint16(halves[i] & np.uint16(0x7FFF)))
        raw = np.empty(1, np.uint16)
        raw[0] = most
        widen(raw.view(np.uint8), code, 0, 1, value)
    return float(value[0])
