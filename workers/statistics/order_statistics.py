"""Exact trim thresholds by two radix histograms of magnitudes: streamed, added over shards, no
sorting.

A float32 magnitude is an ordered 31-bit integer. The first histogram counts its upper 15 bits; the
rank that is sought falls into one bin; the second counts the lower 16 bits of that bin's entries.
The result equals `kthvalue`.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

LOW_BITS = 16
NUM_HIGH_BINS = 1 << (31 - LOW_BITS)
NUM_LOW_BINS = 1 << LOW_BITS

Counts = NDArray[np.int64]


def trim_rank(
    num_entries: int, density: float, *, rounding: Literal["kept", "dropped"] = "kept"
) -> int:
    """Return the ascending rank (1-based) of the trim threshold, 0 when everything is kept.

    N − int(density·N), as the official TIES code computes it (docs/arithmetic.md, Trim); with
    rounding `dropped` it is int((1 − density)·N), as the code of MLLMerging computes it. 1 −
    density is taken in decimal: 1 − 0.8 is 0.2.
    """
    if rounding == "kept":
        return num_entries - int(density * num_entries)
    return int(float(1 - Decimal(repr(density))) * num_entries)


def magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes of a float32 tensor as ordered int32 (the sign bit cleared), flat."""
    return delta.reshape(-1).view(torch.int32) & 0x7FFFFFFF


def high_histogram(delta: torch.Tensor) -> Counts:
    """Return how many magnitudes of a float32 tensor fall into each of the 32,768 upper bins."""
    counts = torch.bincount(magnitude_bits(delta) >> LOW_BITS, minlength=NUM_HIGH_BINS)
    return np.asarray(counts.cpu().numpy(), dtype=np.int64)


def low_histogram(delta: torch.Tensor, *, high_bin: int) -> Counts:
    """Return how many magnitudes of one upper bin have each value of the lower 16 bits."""
    bits = magnitude_bits(delta)
    counts = torch.bincount(
        bits[(bits >> LOW_BITS) == high_bin] & (NUM_LOW_BINS - 1), minlength=NUM_LOW_BINS
    )
    return np.asarray(counts.cpu().numpy(), dtype=np.int64)


def find_bin(counts: Counts, rank: int) -> tuple[int, int]:
    """Return the bin that holds the entry of ascending `rank` (1-based), and its rank within that
    bin.

    Raises:
        ValueError: the histogram has fewer entries than `rank`.
    """
    cumulative = np.cumsum(counts)
    if not 1 <= rank <= int(cumulative[-1]):
        raise ValueError(f"rank {rank} is outside of 1 to {int(cumulative[-1])}")
    index = int(np.searchsorted(cumulative, rank))
    return index, rank - (int(cumulative[index - 1]) if index else 0)


def to_threshold(high_bin: int, low_bin: int) -> float:
    """Return the float32 magnitude whose bits are these two bins."""
    return float(np.array([(high_bin << LOW_BITS) | low_bin], dtype=np.uint32).view(np.float32)[0])


def to_sparse(counts: Counts) -> tuple[NDArray[np.uint16], Counts]:
    """Return the non-empty bins and their counts."""
    bins = np.flatnonzero(counts)
    return bins.astype(np.uint16), counts[bins]


def add_sparse(histograms: Iterable[tuple[NDArray[np.uint16], Counts]], *, num_bins: int) -> Counts:
    """Return the sum of sparse histograms as a dense one."""
    total = np.zeros(num_bins, dtype=np.int64)
    for bins, counts in histograms:
        total[bins] += counts
    return total


def exact_threshold(delta: torch.Tensor, *, density: float) -> float:
    """Return the trim threshold of one float32 tensor held in memory: every magnitude at or above
    it is kept.
    """
    rank = trim_rank(delta.numel(), density)
    if rank == 0:
        return 0.0
    high_bin, bin_rank = find_bin(high_histogram(delta), rank)
    return to_threshold(high_bin, find_bin(low_histogram(delta, high_bin=high_bin), bin_rank)[0])
