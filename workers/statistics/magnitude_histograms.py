"""Exact trim thresholds from histograms of magnitudes: streamed, added over shards, no sorting.

A float32 magnitude is an ordered 31-bit integer. Its upper 19 bits, and whether any lower bit is
set, name one of 2²⁰ bins. A bin without lower bits holds one value, so that a threshold that falls
into it is exact: this is the rule for task vectors of bfloat16 and float16 checkpoints, whose
differences have few significant bits. For any other bin a second pass counts the lower 12 bits of
its entries. Either way the result equals `kthvalue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.kernels.magnitudes import (
    NUM_COUNTERS,
    NUM_LOWS,
    NUM_TOPS,
    count_lower_bits,
    count_magnitudes,
    drain_histogram,
)
from mmerge.workers.kernels.sce import count_variances

NUM_BINS = NUM_TOPS * NUM_LOWS
LOWER_BITS = 12
NUM_LOWER = 1 << LOWER_BITS

Histogram = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The bins that are not empty, ascending, and their counts."""


class MagnitudeCounter:
    """Counts the magnitudes of task vectors; one for a whole task, so that its tables are made
    once.
    """

    def __init__(self, num_experts: int) -> None:
        self._tables = np.zeros((num_experts, NUM_COUNTERS), np.uint32)
        self._ranges = np.empty((num_experts, 2), np.uint32)
        self._forget_ranges()

    def add(self, block: InputBlock) -> None:
        """Count one block of base and experts."""
        count_magnitudes(
            block.addresses, block.codes, block.num_entries, self._tables, self._ranges
        )

    def add_variances(self, block: InputBlock, experts: tuple[np.float32, ...]) -> None:
        """Count, in a counter of one histogram, the variances of the task vectors across experts.

        `experts` has one element per expert, of any value, see `variance_tile`.
        """
        count_variances(
            block.addresses,
            block.codes,
            experts,
            block.num_entries,
            self._tables[0],
            self._ranges[0],
        )

    def is_finite(self) -> bool:
        """Return whether everything that was counted is finite."""
        return bool((self._ranges[:, 1] < 0x7F800000).all())

    def drain(self) -> list[Histogram]:
        """Return the histogram of each expert, and begin anew."""
        histograms: list[Histogram] = []
        for table, (smallest, largest) in zip(self._tables, self._ranges, strict=True):
            room = (max(int(largest) >> 16, 0) + 2) * NUM_LOWS
            bins, counts = np.empty(room, np.uint32), np.empty(room, np.int64)
            used = drain_histogram(table, int(smallest), int(largest), bins, counts)
            histograms.append((bins[:used].copy(), counts[:used].copy()))
        self._forget_ranges()
        return histograms

    def _forget_ranges(self) -> None:
        self._ranges[:, 0], self._ranges[:, 1] = np.iinfo(np.uint32).max, 0


def scan_bytes(num_entries: Sequence[int], *, num_experts: int) -> int:
    """Return the bytes of a counter, and of the histograms of tensors with so many entries: all
    values within 16 exponents.
    """
    histograms = sum(min(count, 1 << 17) * 12 for count in num_entries)
    return num_experts * (NUM_COUNTERS * 4 + histograms)


def find_bin(histogram: Histogram, rank: int) -> tuple[int, int]:
    """Return the bin that holds the entry of ascending `rank` (1-based), and its rank within that
    bin.

    Raises:
        ValueError: the histogram has fewer entries than `rank`.
    """
    bins, counts = histogram
    cumulative = np.cumsum(counts)
    last = int(cumulative[-1]) if len(cumulative) else 0
    if not 1 <= rank <= last:
        raise ValueError(f"rank {rank} is outside of 1 to {last}")
    index = int(np.searchsorted(cumulative, rank))
    num_before = int(cumulative[index - 1]) if index else 0
    return int(bins[index]), rank - num_before


def is_exact(bin_number: int) -> bool:
    """Return whether all entries of a bin have the same magnitude."""
    return bin_number % 2 == 0


def to_magnitude(bin_number: int, lower: int = 0) -> float:
    """Return the float32 magnitude of a bin's upper bits and these lower 12 bits."""
    bits = ((bin_number // 2) << LOWER_BITS) | lower
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def add_histograms(histograms: Sequence[Histogram], *, num_bins: int = NUM_BINS) -> Histogram:
    """Return the sum of histograms."""
    if len(histograms) == 1:
        return histograms[0]
    total = HistogramSum(num_bins)
    for histogram in histograms:
        total.add(histogram)
    return total.histogram()


class HistogramSum:
    """Adds histograms one by one, so that none of them has to be kept: 8 bytes per bin, however
    many are added.
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        self._counts = np.zeros(num_bins, np.int64)

    def add(self, histogram: Histogram) -> None:
        """Add the counts of a histogram."""
        bins, counts = histogram
        self._counts[bins] += counts

    def histogram(self) -> Histogram:
        """Return the sum of what was added."""
        filled = np.flatnonzero(self._counts)
        return filled.astype(np.uint32), self._counts[filled]


def find_top(
    histogram: Histogram, count: int, *, refine: Callable[[int], Histogram]
) -> tuple[float, int]:
    """Return the threshold of the `count` largest magnitudes, and how many at the threshold belong
    to them.

    −1 and Inf where all and none belong. `refine` returns the histogram of the lower bits within a
    bin.
    """
    num_entries = int(histogram[1].sum())
    if count <= 0:
        return float("inf"), 0
    if count >= num_entries:
        return -1.0, 0
    bin_number, bin_rank = find_bin(histogram, num_entries - count + 1)
    if is_exact(bin_number):
        return to_magnitude(bin_number), _count_of(histogram, bin_number) - bin_rank + 1
    lower = refine(bin_number)
    lower_bits, bin_rank = find_bin(lower, bin_rank)
    return to_magnitude(bin_number, lower_bits), _count_of(lower, lower_bits) - bin_rank + 1


def _count_of(histogram: Histogram, bin_number: int) -> int:
    return int(histogram[1][np.searchsorted(histogram[0], bin_number)])


def count_lower(blocks: Iterable[InputBlock], *, bin_number: int) -> Histogram:
    """Return the histogram of the lower 12 bits of the magnitudes of one bin; the blocks are of
    base and one expert.
    """
    counts = np.zeros(NUM_LOWER, np.int64)
    for block in blocks:
        count_lower_bits(block.addresses, block.codes, block.num_entries, bin_number // 2, counts)
    return to_lower(counts)


def to_lower(counts: NDArray[np.int64]) -> Histogram:
    """Return counts of lower bits as a histogram, without those that have none: they have a bin of
    their own.
    """
    counts[0] = 0
    bins = np.flatnonzero(counts)
    return bins.astype(np.uint32), counts[bins]
