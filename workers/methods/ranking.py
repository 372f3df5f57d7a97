"""Exact numbers of largest entries, without sorting: a threshold by radix histograms, ties by
position.
"""

from __future__ import annotations

import torch

from mmerge.workers.statistics.exact_sums import high_ranks, low_ranks, to_ranked
from mmerge.workers.statistics.order_statistics import find_bin

_SMALL = 1 << 16
"""Up to so many values a selection is quicker than the two histograms; the result is the same."""


def ranked_value(values: torch.Tensor, rank: int) -> float:
    """Return the value of ascending `rank` (1-based) of a float32 tensor. Raises ValueError when
    there is no such rank.
    """
    if values.numel() <= _SMALL:
        return float(values.reshape(-1).kthvalue(rank).values)
    high_bin, bin_rank = find_bin(high_ranks(values), rank)
    return to_ranked(high_bin, find_bin(low_ranks(values, high_bins=[high_bin])[0], bin_rank)[0])


def top_mask(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return a boolean mask, shape of `values`, of exactly the `count` largest entries of a float32
    tensor.

    Among equal values the lower position in C order wins (our choice; published codes leave it to
    their sort). So the mask of a smaller count is contained in that of a larger one.
    """
    if count <= 0:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if count >= values.numel():
        return torch.ones(values.shape, dtype=torch.bool, device=values.device)
    threshold = ranked_value(values, values.numel() - count + 1)
    flat = values.reshape(-1)
    mask = flat > threshold
    missing = count - int(mask.count_nonzero())
    mask[(flat == threshold).nonzero().reshape(-1)[:missing]] = True
    return mask.reshape(values.shape)
