from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmerge.workers.statistics.order_statistics import (
    NUM_HIGH_BINS,
    NUM_LOW_BINS,
    add_sparse,
    exact_threshold,
    find_bin,
    high_histogram,
    low_histogram,
    to_sparse,
    to_threshold,
    trim_rank,
)

DENSITIES = st.floats(0.001, 1.0)


def by_sorting(delta: torch.Tensor, density: float) -> float:
    rank = trim_rank(delta.numel(), density)
    return float(delta.abs().flatten().kthvalue(rank).values) if rank else 0.0


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200), DENSITIES)
def test_the_threshold_is_the_kth_magnitude(values: list[float], density: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    assert exact_threshold(delta, density=density) == by_sorting(delta, density)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [0.2, 0.8, 0.999])
def test_the_threshold_is_exact_where_many_magnitudes_are_equal(
    dtype: torch.dtype, density: float
) -> None:
    delta = (
        (torch.randn(50_001, generator=torch.Generator().manual_seed(1)) / 100).to(dtype).float()
    )
    assert exact_threshold(delta, density=density) == by_sorting(delta, density)


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_histograms_of_pieces_add_up_to_the_threshold_of_the_whole(
    num_pieces: int, seed: int, density: float
) -> None:
    delta = (
        torch.randn(997, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).float()
    )
    pieces = delta.chunk(num_pieces)
    rank = trim_rank(delta.numel(), density)
    high, rest = find_bin(
        add_sparse((to_sparse(high_histogram(piece)) for piece in pieces), num_bins=NUM_HIGH_BINS),
        rank,
    )
    low = add_sparse(
        (to_sparse(low_histogram(piece, high_bin=high)) for piece in pieces), num_bins=NUM_LOW_BINS
    )
    assert to_threshold(high, find_bin(low, rest)[0]) == by_sorting(delta, density)


def test_density_one_keeps_everything_and_the_rank_is_that_of_the_official_code() -> None:
    assert trim_rank(5200, 1.0) == 0
    assert trim_rank(5200, 0.8) == 5200 - int(0.8 * 5200)
    assert exact_threshold(torch.ones(5), density=1.0) == 0.0


def test_a_rank_outside_of_the_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of 1 to 3"):
        find_bin(np.array([1, 2]), 4)
