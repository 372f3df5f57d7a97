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
    turn_sign,
    widen_at,
)


@compiled
def variance_tile(
    inputs: Any,
    codes: Any,
    start: int,
    count: int,
    base: Any,
    deltas: Any,
    mean: Any,
    variance: Any,
) -> None:
    """Write the task vectors of a tile to `deltas` and their variance across experts to `variance`."""
    num_experts = deltas.shape[0]
    number = np.float32(num_experts)
    widen_at(inputs[0], codes[0], start, count, base)
    if num_experts == 3:
        # The same in one loop: what is summed stays in registers.
        first, second, third = deltas[0], deltas[1], deltas[2]
        for expert in range(num_experts):
            widen_at(inputs[expert + 1], codes[expert + 1], start, count, deltas[expert])
        for i in range(count):
            one, two, three = first[i] - base[i], second[i] - base[i], third[i] - base[i]
            first[i], second[i], third[i] = one, two, three
            middle = (one + two + three) / number
            one, two, three = one - middle, two - middle, three - middle
            variance[i] = (one * one + two * two + three * three) / number
        return
    for expert in range(num_experts):
        delta = deltas[expert]
        subtract_at(inputs[expert + 1], codes[expert + 1], start, count, base, delta)
    first = deltas[0]
    for i in range(count):
        mean[i] = first[i]
    for expert in range(1, num_experts):
        delta = deltas[expert]
        for i in range(count):
            mean[i] = mean[i] + delta[i]
    for i in range(count):
        mean[i] = mean[i] / number
    for expert in range(num_experts):
        delta = deltas[expert]
        for i in range(count):
            off = delta[i] - mean[i]
            square = off * off
            variance[i] = square if expert == 0 else variance[i] + square
    for i in range(count):
        variance[i] = variance[i] / number


@compiled
def count_variances(
    inputs: Any, codes: Any, num_entries: int, histogram: Any, smallest_and_largest: Any
) -> None:
    """Add the variances of a block to a histogram, as `count_magnitudes` does with magnitudes."""
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, mean, variance = tiles[0], tiles[1], tiles[2]
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    places = np.empty(TILE_ENTRIES, np.uint32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, mean, variance)
        count_tile(variance, count, places, histogram, smallest_and_largest)


@compiled
def count_variances_within(
    inputs: Any, codes: Any, num_entries: int, upper: int, counts: Any
) -> None:
    """Add to `counts` (int64, 4,096) the lower 12 bits of the variances whose upper 19 bits are
    `upper`.
    """
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, mean, variance = tiles[0], tiles[1], tiles[2]
    bits = variance.view(np.uint32)
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    wanted = np.uint32(upper)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, mean, variance)
        for i in range(count):
            word = np.uint32(bits[i])
            if word >> np.uint32(12) == wanted:
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
            variance[i] = np.float32(ties[1] < ties[0])
            ties[1] += 1
        else:
            variance[i] = np.float32(variance[i] > threshold)
    return np.float32(1)


@compiled
def sum_selected(
    inputs: Any, codes: Any, num_entries: int, threshold: Any, ties: Any, sums: Any
) -> None:
    """Add the squares of the selected entries to `sums`: per exponent the sum of the significands.

    What is not finite, selected or not, is counted in `sums[0, 255]`.

    Args:
        sums: int64 (experts, NUM_COPIES * NUM_SUM_BINS), see `sum_products`.
    """
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, mean, variance = tiles[0], tiles[1], tiles[2]
    bits, spread = mean.view(np.uint32), variance.view(np.uint32)
    chosen = np.empty(TILE_ENTRIES, np.uint32)
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, mean, variance)
        largest = np.uint32(0)
        for i in range(count):
            largest = max(largest, np.uint32(spread[i]))
        if largest >= np.uint32(0x7F800000):
            sums[0, 255] += 1
        cut = cut_variances(variance, count, threshold, ties)
        found = np.uint32(0)
        for i in range(count):
            chosen[found] = np.uint32(i)
            found = np.uint32(found + np.uint32(variance[i] >= cut))
        for expert in range(deltas.shape[0]):
            delta, total = deltas[expert], sums[expert]
            for i in range(found):
                value = delta[chosen[i]]
                mean[i] = value * value
            for i in range(found):
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
    """Write θ₀ + scale·Σ wᵢeᵢτᵢ / Σ wᵢeᵢ over the selected entries of one block to `out` (bytes)."""
    tiles = np.empty((6, TILE_ENTRIES), np.float32)
    base, sign, variance, total, divisor, selected = (
        tiles[0],
        tiles[1],
        tiles[2],
        tiles[3],
        tiles[4],
        tiles[5],
    )
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, sign, variance)
        cut = cut_variances(variance, count, threshold, ties)
        if deltas.shape[0] == 3:
            erase_three(deltas, weights, variance, cut, scale, base, count, total)
            narrow(total, out_code, count, out, start)
            continue
        for expert in range(deltas.shape[0]):
            delta = deltas[expert]
            for i in range(count):
                selected[i] = select(variance[i] >= cut, delta[i], zero)
            for i in range(count):
                sign[i] = selected[i] if expert == 0 else sign[i] + selected[i]
        for i in range(count):
            sign[i] = select(sign[i] < zero, -one, one)  # a sum of zero elects +1
            total[i] = zero
            divisor[i] = zero
        for expert in range(deltas.shape[0]):
            delta, weight = deltas[expert], weights[expert]
            for i in range(count):
                value = select(variance[i] >= cut, delta[i], zero)
                agrees = turn_sign(value, sign[i]) > zero
                total[i] = total[i] + select(agrees, weight * value, zero)
                divisor[i] = divisor[i] + select(agrees, weight, zero)
        for i in range(count):
            merged = total[i] / select(divisor[i] == zero, one, divisor[i])
            total[i] = base[i] + scale * merged
        narrow(total, out_code, count, out, start)


@compiled
def erase_three(
    deltas: Any,
    weights: Any,
    variance: Any,
    cut: Any,
    scale: Any,
    base: Any,
    count: int,
    merged: Any,
) -> None:
    """Do what `merge_sce` does with a tile of three experts, in one loop."""
    zero, one = np.float32(0), np.float32(1)
    first, second, third = deltas[0], deltas[1], deltas[2]
    weight_1, weight_2, weight_3 = weights[0], weights[1], weights[2]
    for i in range(count):
        is_selected = variance[i] >= cut
        value_1, value_2, value_3 = (
            select(is_selected, first[i], zero),
            select(is_selected, second[i], zero),
            select(is_selected, third[i], zero),
        )
        sign = select(value_1 + value_2 + value_3 < zero, -one, one)
        agrees_1, agrees_2, agrees_3 = (
            turn_sign(value_1, sign) > zero,
            turn_sign(value_2, sign) > zero,
            turn_sign(value_3, sign) > zero,
        )
        total = zero + select(agrees_1, weight_1 * value_1, zero)
        total = (
            total
            + select(agrees_2, weight_2 * value_2, zero)
            + select(agrees_3, weight_3 * value_3, zero)
        )
        divisor = (
            select(agrees_1, weight_1, zero)
            + select(agrees_2, weight_2, zero)
            + select(agrees_3, weight_3, zero)
        )
        merged[i] = base[i] + scale * (total / select(divisor == zero, one, divisor))
