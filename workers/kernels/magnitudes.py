"""The scan of a block, compiled: histograms of task-vector magnitudes, and the first
entry that is not finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    bytes_at,
    compiled,
    select,
    subtract_at,
    to_bits,
    widen_at,
)

TOP_BITS = 15
"""Upper bits of a magnitude (31 bits): all that the difference of two bfloat16 values near each
other has.
"""
NUM_TOPS = 1 << TOP_BITS
NUM_LOWS = 32
"""Classes of the lower 16 bits: twice their upper 4 bits, plus 1 where one of the other 12 is set.
"""
NUM_COPIES = 4
"""Counters that take turns for class 0: many entries have the same magnitude, and an addition must
wait for the one before it.
"""
NUM_COUNTERS = NUM_TOPS * (NUM_COPIES + NUM_LOWS)
"""Counters of a histogram: those of class 0, the copies of a value side by side, then those of all
classes, in ascending order.

What is counted lies close together in either part, so that it stays in the caches."""


@compiled
def first_non_finite(address: int, code: int, num_entries: int) -> int:
    """Return the position of the first NaN or Inf among the entries of the bytes at `address`, −1
    where all are finite.
    """
    if code == 0:
        words = bytes_at(address, num_entries * 4).view(np.uint32)
        for start in range(0, num_entries, TILE_ENTRIES):
            part = words[start : min(start + TILE_ENTRIES, num_entries)]
            largest = np.uint32(0)
            for i in range(len(part)):
                largest = max(largest, np.uint32(part[i] & np.uint32(0x7FFFFFFF)))
            if largest >= np.uint32(0x7F800000):
                for i in range(len(part)):
                    if part[i] & np.uint32(0x7FFFFFFF) >= np.uint32(0x7F800000):
                        return start + i
    else:
        infinite = np.uint16(0x7F80 if code == 1 else 0x7C00)
        halves = bytes_at(address, num_entries * 2).view(np.uint16)
        for start in range(0, num_entries, TILE_ENTRIES):
            short = halves[start : min(start + TILE_ENTRIES, num_entries)]
            most = np.uint16(0)
            for i in range(len(short)):
                most = max(most, np.uint16(short[i] & np.uint16(0x7FFF)))
            if most >= infinite:
                for i in range(len(short)):
                    if np.uint16(short[i] & np.uint16(0x7FFF)) >= infinite:
                        return start + i
    return -1


@compiled
def count_magnitudes(
    inputs: Any, codes: Any, num_entries: int, histograms: Any, ranges: Any
) -> None:
    """Add the magnitudes of a block's task vectors to the histograms.

    Args:
        inputs: int64, where the rows of bytes begin, base first.
        histograms: uint32, (experts, NUM_COUNTERS).
        ranges: uint32, (experts, 2): the smallest magnitude but 0, less 1, and the largest, as
            bits.
    """
    tiles = np.empty((2, TILE_ENTRIES), np.float32)
    base, delta = tiles[0], tiles[1]
    places = np.empty(TILE_ENTRIES, np.uint32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        for expert in range(inputs.shape[0] - 1):
            subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, delta)
            count_tile(delta, count, places, histograms[expert], ranges[expert])


@compiled
def count_tile(
    values: Any, count: int, places: Any, histogram: Any, smallest_and_largest: Any
) -> None:
    """Add the magnitudes of a tile of float32 values to a histogram; `places` is uint32 scratch."""
    smallest, largest = np.uint32(smallest_and_largest[0]), np.uint32(smallest_and_largest[1])
    for i in range(count):
        word = np.uint32(to_bits(values[i]) & np.uint32(0x7FFFFFFF))
        largest = max(largest, word)
        smallest = min(smallest, np.uint32(word - np.uint32(1)))
        # Twice the upper 19 bits, plus 1 where a lower one is set: NUM_LOWS times the upper 15,
        # plus the class of the others. Each step is cast: integers of 32 bits that meet become 64
        # wide, and halve the vectors.
        some = select(
            np.uint32(word & np.uint32(0xFFF)) != np.uint32(0), np.uint32(1), np.uint32(0)
        )
        bin_number = np.uint32(
            np.uint32(np.uint32(word >> np.uint32(11)) & np.uint32(0xFFFFFFFE)) | some
        )
        of_zero = np.uint32(
            np.uint32(np.uint32(word >> np.uint32(16)) * np.uint32(NUM_COPIES))
            | np.uint32(i & (NUM_COPIES - 1))
        )
        of_others = np.uint32(bin_number + np.uint32(NUM_COPIES * NUM_TOPS))
        places[i] = select(np.uint32(word & np.uint32(0xFFFF)) == np.uint32(0), of_zero, of_others)
    smallest_and_largest[0], smallest_and_largest[1] = smallest, largest
    for i in range(count):
        histogram[places[i]] += np.uint32(1)


@compiled
def count_lower_bits(inputs: Any, codes: Any, num_entries: int, upper: int, counts: Any) -> None:
    """Add to `counts` (int64, 4,096) the lower 12 bits of the magnitudes of one task vector whose
    upper 19 bits are `upper`.

    Args:
        inputs: int64, where two rows of bytes begin, the base and one expert.
    """
    tiles = np.empty((2, TILE_ENTRIES), np.float32)
    base, delta = tiles[0], tiles[1]
    bits = delta.view(np.uint32)
    upper_bits = np.uint32(upper)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        widen_at(inputs[0], codes[0], start, count, base)
        subtract_at(inputs[1], codes[1], start, count, base, delta)
        for i in range(count):
            word = bits[i] & np.uint32(0x7FFFFFFF)
            if word >> np.uint32(12) == upper_bits:
                counts[word & np.uint32(0xFFF)] += 1


@compiled
def drain_histogram(histogram: Any, smallest: int, largest: int, bins: Any, counts: Any) -> int:
    """Move the histogram of one expert to `bins` and `counts`, in ascending order, and clear it;
    return how many there are.

    A bin's number is NUM_LOWS times the upper 15 bits, plus the class of the lower 16. `bins` and
    `counts` must have room for all bins of the range and for the bin of 0.
    """
    num_bins = 0
    for step in range(2):
        # Magnitude 0 lies outside of the range, so that the range stays narrow.
        first, last = (0, 0) if step == 0 else (max(smallest >> 16, 1), largest >> 16)
        for top in range(first, last + 1):
            total = 0
            for place in range(top * NUM_COPIES, (top + 1) * NUM_COPIES):
                total += histogram[place]
                histogram[place] = 0
            classes = histogram[
                NUM_COPIES * NUM_TOPS + top * NUM_LOWS : NUM_COPIES * NUM_TOPS
                + (top + 1) * NUM_LOWS
            ]
            classes[0] = total
            for low in range(NUM_LOWS):
                if classes[low]:
                    bins[num_bins] = top * NUM_LOWS + low
                    counts[num_bins] = classes[low]
                    num_bins += 1
                    classes[low] = 0
    return num_bins
