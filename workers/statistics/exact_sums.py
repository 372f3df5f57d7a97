"""Sums and order statistics that are exact, and so depend on no order: not on blocks, pieces of a
tensor, threads or workers.

A float32 is an integer of 24 bits times a power of two. Values are counted by sign and exponent,
and for each of these 512
bins the integers are added: int64 arithmetic, exact. The sum of all bins is formed with Python's
integers and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from mmerge.workers.statistics.order_statistics import Counts

NUM_SUM_BINS = 512
NUM_RANK_BINS = 1 << 16
_TILE_ENTRIES = 1 << 22


def count_sum(values: torch.Tensor) -> Counts:
    """Return, for each sign and exponent, the sum of the integer significands of a float32 tensor,
    int64 [512].

    Exact for up to 2³⁹ values over all tensors that are added up.
    """
    total = np.zeros(NUM_SUM_BINS, dtype=np.int64)
    flat = values.detach().to(torch.float32).reshape(-1)
    for start in range(0, flat.numel(), _TILE_ENTRIES):
        bits = flat[start : start + _TILE_ENTRIES].view(torch.int32)
        exponent = (bits >> 23) & 0xFF
        significand = (bits & 0x7FFFFF) + ((exponent != 0).to(torch.int32) << 23)
        # float64 adds integers below 2^24 exactly up to 2^29 of them; a tile has far fewer.
        counted = torch.bincount(
            (bits >> 23) & 0x1FF, weights=significand.to(torch.float64), minlength=NUM_SUM_BINS
        )
        total += np.asarray(counted.cpu().numpy(), dtype=np.int64)
    return total


def to_sum(counts: Counts) -> float:
    """Return the number that counts of `count_sum`, added over blocks, stand for: the exact sum,
    rounded once to float64.
    """
    positive, negative = counts[:256], counts[256:]
    if positive[255] or negative[255]:
        return float("nan")
    difference = (positive[:255] - negative[:255]).tolist()
    units = sum(count << max(exponent - 1, 0) for exponent, count in enumerate(difference))
    return float(Fraction(units, 1 << 149))


def exact_sum(values: torch.Tensor) -> float:
    """Return the sum of a float32 tensor held in memory, rounded once to float64; NaN where it
    holds NaN or Inf.
    """
    return to_sum(count_sum(values))


def rank_bits(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values as int64 in 0 to 2³² − 1 whose order is that of the values (−0 counts
    as 0), flat.
    """
    bits = (values.detach().to(torch.float32).reshape(-1) + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + (1 << 31)


def high_ranks(values: torch.Tensor) -> Counts:
    """Return how many values have each of the 65,536 upper halves of `rank_bits`."""
    return np.asarray(
        torch.bincount(rank_bits(values) >> 16, minlength=NUM_RANK_BINS).cpu().numpy(),
        dtype=np.int64,
    )


def low_ranks(values: torch.Tensor, *, high_bins: Sequence[int]) -> list[Counts]:
    """Return per upper half given how many of its values have each lower half."""
    bits = rank_bits(values)
    high, low = bits >> 16, bits & 0xFFFF
    low_counts = []
    for high_bin in high_bins:
        counts = torch.bincount(low[high == high_bin], minlength=NUM_RANK_BINS)
        low_counts.append(np.asarray(counts.cpu().numpy(), dtype=np.int64))
    return low_counts


def to_ranked(high_bin: int, low_bin: int) -> float:
    """Return the float32 value whose `rank_bits` have these two halves."""
    bits = ((high_bin << 16) | low_bin) - (1 << 31)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return float(np.array([bits], dtype=np.int32).view(np.float32)[0])
