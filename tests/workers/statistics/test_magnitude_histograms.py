from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from input_blocks import make_block

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES
from mmerge.workers.statistics.magnitude_histograms import (
    NUM_LOWER,
    Histogram,
    MagnitudeCounter,
    add_histograms,
    count_lower,
    find_bin,
    is_exact,
    to_magnitude,
)
from mmerge.workers.statistics.order_statistics import trim_rank


def by_sorting(delta: torch.Tensor, rank: int) -> float:
    return float(delta.abs().kthvalue(rank).values)


def by_histograms(pieces: list[InputBlock], rank: int) -> tuple[float, bool]:
    """The threshold, and whether a second pass was needed."""
    counter = MagnitudeCounter(1)
    found: list[Histogram] = []
    for piece in pieces:
        counter.add(piece)
        found += counter.drain()
    bin_number, rest = find_bin(add_histograms(found), rank)
    if is_exact(bin_number):
        return to_magnitude(bin_number), False
    lower = add_histograms(
        [count_lower([piece], bin_number=bin_number) for piece in pieces], num_bins=NUM_LOWER
    )
    return to_magnitude(bin_number, find_bin(lower, rest)[0]), True


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
    st.floats(0.001, 0.999),
    st.integers(1, 4),
)
def test_the_threshold_is_the_kth_magnitude(
    values: list[float], density: float, num_pieces: int
) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    rank = max(trim_rank(delta.numel(), density), 1)
    pieces = [make_block([torch.zeros_like(piece), piece]) for piece in delta.chunk(num_pieces)]
    assert by_histograms(pieces, rank)[0] == by_sorting(delta, rank)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.8, 0.999])
def test_the_threshold_of_tuned_weights_is_exact(dtype: str, density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(200_003, generator=generator) / 50).to(TORCH_DTYPES[dtype])
    expert = (base.float() + torch.randn(200_003, generator=generator) / 2000).to(
        TORCH_DTYPES[dtype]
    )
    delta = expert.float() - base.float()
    rank = trim_rank(delta.numel(), density)
    found, was_refined = by_histograms(
        [
            make_block([base[part], expert[part]])
            for part in (slice(0, 99_999), slice(99_999, None))
        ],
        rank,
    )
    assert found == by_sorting(delta, rank)
    if dtype != "F32" and density in (0.2, 0.8):
        assert not was_refined, "one pass is enough for 16-bit checkpoints"


def test_a_counter_begins_anew_after_it_was_drained() -> None:
    counter = MagnitudeCounter(2)
    zero = torch.zeros(4099)
    counter.add(make_block([zero, torch.full((4099,), 0.3), torch.full((4099,), -(2.0**-20))]))
    first, second = counter.drain()
    assert (len(first[0]), int(first[1].sum()), is_exact(int(first[0][0]))) == (1, 4099, False)
    assert (to_magnitude(int(second[0][0])), int(second[1].sum())) == (2.0**-20, 4099)
    counter.add(make_block([zero, zero, zero]))
    assert all(
        (bins.tolist(), counts.tolist()) == ([0], [4099]) for bins, counts in counter.drain()
    )


def test_a_rank_outside_of_the_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of 1 to 3"):
        find_bin((np.array([1, 7], np.uint32), np.array([1, 2])), 4)
