"""SCE in passes over a tensor: variances counted, squares of the selected entries summed exactly, then the merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels import TILE_ENTRIES, compiled, narrow, widen_at
from mmerge.workers.kernels_locate import top_tile
from mmerge.workers.kernels_survey import count_tile


@compiled
def variance_tile(inputs: Any, codes: Any, start: int, count: int, base: Any, deltas: Any, mean: Any, variance: Any) -> None:
    """Write the task vectors of a tile to `deltas` and their variance across experts to `variance`."""
    num_experts = deltas.shape[0]
    number = np.float32(num_experts)
    widen_at(inputs[0], codes[0], start, count, base)
    for expert in range(num_experts):
        delta = deltas[expert]
        widen_at(inputs[expert + 1], codes[expert + 1], start, count, delta)
        for i in range(count):
            delta[i] = delta[i] - base[i]
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
def count_variances(inputs: Any, codes: Any, num_entries: int, histogram: Any, smallest_and_largest: Any) -> None:
    """Add the variances of a block to a histogram, as `count_magnitudes` does with magnitudes."""
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, mean, variance = tiles[0], tiles[1], tiles[2]
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    places = np.empty(TILE_ENTRIES, np.uint32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, mean, variance)
        count_tile(variance.view(np.uint32), count, places, histogram, smallest_and_largest)


@compiled
def count_variances_within(inputs: Any, codes: Any, num_entries: int, upper: int, counts: Any) -> None:
    """Add to `counts` (int64, 4,096) the lower 12 bits of the variances whose upper 19 bits are `upper`."""
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
def sum_selected(inputs: Any, codes: Any, num_entries: int, threshold: Any, ties: Any, sums: Any) -> None:
    """Add the squares of the selected entries to `sums` (int64, (experts, 512)): per exponent the sum of the significands.

    What is not finite, selected or not, is counted in `sums[0, 255]`.
    """
    tiles = np.empty((3, TILE_ENTRIES), np.float32)
    base, mean, variance = tiles[0], tiles[1], tiles[2]
    bits, spread = mean.view(np.uint32), variance.view(np.uint32)
    flags = np.zeros(TILE_ENTRIES, np.uint8)
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, mean, variance)
        top_tile(variance, count, threshold, ties, flags)
        largest = np.uint32(0)
        for i in range(count):
            largest = max(largest, np.uint32(spread[i]))
        if largest >= np.uint32(0x7F800000):
            sums[0, 255] += 1
        for expert in range(deltas.shape[0]):
            delta, total = deltas[expert], sums[expert]
            for i in range(count):
                value = delta[i] if flags[i] == 1 else np.float32(0)
                mean[i] = value * value
            for i in range(count):
                word = np.uint32(bits[i])
                exponent = word >> np.uint32(23)
                significand = (word & np.uint32(0x7FFFFF)) | (np.uint32(0x800000) if exponent != 0 else np.uint32(0))
                total[exponent] += np.int64(significand)


@compiled
def merge_sce(
    inputs: Any, codes: Any, num_entries: int, threshold: Any, ties: Any, weights: Any, scale: Any, out_code: int, out: Any
) -> None:
    """Write θ₀ + scale·Σ wᵢeᵢτᵢ / Σ wᵢeᵢ over the selected entries of one block to `out` (bytes)."""
    tiles = np.empty((5, TILE_ENTRIES), np.float32)
    base, sign, variance, total, divisor = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    flags = np.zeros(TILE_ENTRIES, np.uint8)
    deltas = np.empty((inputs.shape[0] - 1, TILE_ENTRIES), np.float32)
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        variance_tile(inputs, codes, start, count, base, deltas, sign, variance)
        top_tile(variance, count, threshold, ties, flags)
        for expert in range(deltas.shape[0]):
            delta = deltas[expert]
            for i in range(count):
                value = delta[i] if flags[i] == 1 else zero
                delta[i] = value
                sign[i] = value if expert == 0 else sign[i] + value
        for i in range(count):
            sign[i] = -one if sign[i] < zero else one  # a sum of zero elects +1
            total[i] = zero
            divisor[i] = zero
        for expert in range(deltas.shape[0]):
            delta, weight = deltas[expert], weights[expert]
            for i in range(count):
                value = delta[i]
                agrees = ((value > zero) & (sign[i] > zero)) | ((value < zero) & (sign[i] < zero))
                total[i] = total[i] + (weight * value if agrees else zero)
                divisor[i] = divisor[i] + (weight if agrees else zero)
        for i in range(count):
            merged = total[i] / (one if divisor[i] == zero else divisor[i])
            total[i] = base[i] + scale * merged
        narrow(total, out_code, count, out, start)
