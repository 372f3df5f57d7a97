"""SCE in passes over a tensor: variances counted, squares of the selected entries summed exactly,
then the merge.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.inner_products import NUM_COPIES
from mmerge.workers.kernels.locate import cut_tile
from mmerge.workers.kernels.magnitudes import count_tile
from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    compiled,
    narrow,
    select,
    subtract_at,
    widen_at,
)
from mmerge.workers.kernels.unrolled import (
    cut_rows,
    sum_agreeing_weights,
    sum_rows,
    sum_selected_rows,
    sum_squared_distances,
    sum_weighted_agreeing,
)


@compiled
def variance_tile(
    inputs: Any,
    codes: Any,
    experts: Any,
    start: int,
    count: int,
    base: Any,
    deltas: Any,
    variance: Any,
) -> Any:
    """Write the task vectors of a tile to `deltas` and their variance across experts to `variance`;
    return the task vectors as a tuple of rows.

    Args:
        experts: tuple with one element per expert: its length is known when a kernel is compiled.
    """
    number = np.float32(len(experts))
    widen_at(inputs[0], codes[0], start, count, base)
    for expert in range(len(experts)):
        delta = deltas[expert]
        subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, delta)
    rows = cut_rows(deltas, experts, 0, count)
    for i in range(count):
        mean = sum_rows(rows, i) / number
        variance[i] = sum_squared_distances(rows, i, mean) / number
    return rows


@compiled
def count_variances(
    inputs: Any,
    codes: Any,
    experts: Any,
    num_entries: int,
    histogram: Any,
    smallest_and_largest: Any,
) -> None:
    """Add the variances of a block to a histogram, as `count_magnitudes` does with magnitudes."""
    tiles = np.empty((2, TILE_ENTRIES), np.float32)
    base, variance = tiles[0], tiles[1]
    deltas = np.empty((len(experts), TILE_ENTRIES), np.float32)
    places = np.empty(TILE_ENTRIES, np.uint32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, experts, start, count, base, deltas, variance)
        count_tile(variance, count, places, histogram, smallest_and_largest)


@compiled
def count_variances_within(
    inputs: Any, codes: Any, experts: Any, num_entries: int, upper: int, counts: Any
) -> None:
    """Add to `counts` (int64, 4,096) the lower 12 bits of the variances whose upper 19 bits are
    `upper`.
    """
    tiles = np.empty((2, TILE_ENTRIES), np.float32)
    base, variance = tiles[0], tiles[1]
    bits = variance.view(np.uint32)
    deltas = np.empty((len(experts), TILE_ENTRIES), np.float32)
    upper_bits = np.uint32(upper)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, experts, start, count, base, deltas, variance)
        for i in range(count):
            word = np.uint32(bits[i])
            if word >> np.uint32(12) == upper_bits:
                counts[word & np.uint32(0xFFF)] += 1


@compiled
def cut_variances(variance: Any, count: int, threshold: Any, ties: Any) -> Any:
    """Return the value from which on the variances of a tile are selected.

    Where only some of those at the threshold are, the tile becomes 1 for what is selected and 0 for
    the rest.
    """
    cut = cut_tile(variance, count, threshold, ties)
    if not np.isnan(cut):
        return cut
    for i in range(count):
        if variance[i] == threshold:
            variance[i] = np.float32(ties.seen < ties.belonging)
            ties.seen += 1
        else:
            variance[i] = np.float32(variance[i] > threshold)
    return np.float32(1)


@compiled
def sum_selected(
    inputs: Any,
    codes: Any,
    experts: Any,
    num_entries: int,
    threshold: Any,
    ties: Any,
    sums: Any,
) -> None:
    """Add the squares of the selected entries to `sums`: per exponent the sum of the significands.

    What is not finite, selected or not, is counted in `sums[0, 255]`.

    Args:
        sums: int64 (experts, NUM_COPIES * NUM_SUM_BINS), see `sum_products`.
    """
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, squares, variance = tiles[0], tiles[1], tiles[2]
    bits, spread = squares.view(np.uint32), variance.view(np.uint32)
    chosen = np.empty(TILE_ENTRIES, np.uint32)
    deltas = np.empty((len(experts), TILE_ENTRIES), np.float32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, experts, start, count, base, deltas, variance)
        largest = np.uint32(0)
        for i in range(count):
            largest = max(largest, np.uint32(spread[i]))
        if largest >= np.uint32(0x7F800000):
            sums[0, 255] += 1
        cut = cut_variances(variance, count, threshold, ties[0])
        num_chosen = np.uint32(0)
        for i in range(count):
            # Without a branch: a position that is not chosen is overwritten by the next.
            chosen[num_chosen] = np.uint32(i)
            num_chosen = np.uint32(num_chosen + np.uint32(variance[i] >= cut))
        for expert in range(len(experts)):
            delta, total = deltas[expert], sums[expert]
            for i in range(num_chosen):
                value = delta[chosen[i]]
                squares[i] = value * value
            for i in range(num_chosen):
                word = np.uint32(bits[i])
                exponent = word >> np.uint32(23)
                significand = (word & np.uint32(0x7FFFFF)) | (
                    np.uint32(exponent != 0) << np.uint32(23)
                )
                total[(np.uint32(i & (NUM_COPIES - 1)) << np.uint32(9)) | exponent] += np.int64(
                    significand
                )


@compiled
def merge_sce(
    inputs: Any,
    codes: Any,
    num_entries: int,
    threshold: Any,
    ties: Any,
    weights: Any,
    scale: Any,
    out_code: int,
    out: Any,
) -> None:
    """Write θ₀ + scale·Σ wᵢeᵢτᵢ / Σ wᵢeᵢ over the selected entries of one block to `out` (bytes).

    Args:
        threshold: of the variance; ties: TIES (1) at it.
        weights: tuple of float32, one per expert.
    """
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, variance, merged = tiles[0], tiles[1], tiles[2]
    deltas = np.empty((len(weights), TILE_ENTRIES), np.float32)
    zero, unit, infinite = np.float32(0), np.float32(1), np.float32(np.inf)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        rows = variance_tile(inputs, codes, weights, start, count, base, deltas, variance)
        cut = cut_variances(variance, count, threshold, ties[0])
        for i in range(count):
            is_selected = variance[i] >= cut
            # A sum of zero elects +1; what is not selected agrees with nobody.
            sign = select(sum_selected_rows(rows, i, is_selected) < zero, -unit, unit)
            limit = select(is_selected, zero, infinite)
            total = sum_weighted_agreeing(rows, weights, i, sign, limit)
            divisor = sum_agreeing_weights(rows, weights, i, sign, limit)
            merged[i] = base[i] + scale * (total / select(divisor == zero, unit, divisor))
        narrow(merged, out_code, count, out, start)
