"""Exact sums, order statistics, exact counts of the largest, and random numbers, each against a
naive form.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from mmerge.workers.methods.randomness import uniform
from mmerge.workers.methods.ranking import ranked_value, top_mask
from mmerge.workers.statistics.exact_sums import (
    NUM_RANK_BINS,
    count_sum,
    exact_sum,
    high_ranks,
    low_ranks,
    to_ranked,
    to_sum,
)
from mmerge.workers.statistics.order_statistics import find_bin

floats = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50
)


@given(floats)
def test_a_sum_is_exact_and_rounded_once(values: list[float]) -> None:
    assert exact_sum(torch.tensor(values)) == float(sum(map(Fraction, values)))


@given(floats, st.integers(0, 50))
def test_a_sum_does_not_depend_on_how_it_is_split(values: list[float], cut: int) -> None:
    tensor = torch.tensor(values)
    assert to_sum(count_sum(tensor[:cut]) + count_sum(tensor[cut:])) == exact_sum(tensor)


def test_a_sum_of_nan_or_infinity_is_no_number() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert math.isnan(exact_sum(torch.tensor([1.0, value])))


@given(floats, st.integers(1, 50))
def test_an_order_statistic_is_that_of_sorting(values: list[float], rank: int) -> None:
    tensor, rank = torch.tensor(values), min(rank, len(values))
    high_bin, rest = find_bin(high_ranks(tensor), rank)
    found = to_ranked(high_bin, find_bin(low_ranks(tensor, high_bins=[high_bin])[0], rest)[0])
    assert found == sorted(values)[rank - 1] == ranked_value(tensor, rank)
    assert len(high_ranks(tensor)) == NUM_RANK_BINS


def test_selection_in_a_large_tensor_is_that_of_sorting() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert ranked_value(values, 777) == float(values.sort().values[776])


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 30))
def test_exactly_so_many_largest_are_kept_and_of_equals_the_first(
    values: list[int], count: int
) -> None:
    order = sorted(range(len(values)), key=lambda position: (-values[position], position))
    expected = [position in order[:count] for position in range(len(values))]
    assert top_mask(torch.tensor(values, dtype=torch.float32), count).tolist() == expected


def naive_uniform(seed: int, expert: str, name: str, position: int) -> float:
    key = struct.unpack("<Q", blake3(f"{seed}\n{expert}\n{name}".encode()).digest()[:8])[0]
    z = (key + (position // 2 + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    half = (
        (z ^ (z >> 31)).to_bytes(8, "little")[4:]
        if position % 2
        else (z ^ (z >> 31)).to_bytes(8, "little")[:4]
    )
    return int.from_bytes(half[1:], "little") / 2**24


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**63), st.integers(0, 2**40))
def test_random_numbers_are_those_of_the_definition(seed: int, start: int) -> None:
    found = uniform(
        seed, expert="audio", name="model.norm.weight", start=start, like=torch.empty(2, 3)
    )
    expected = [
        naive_uniform(seed, "audio", "model.norm.weight", start + offset) for offset in range(6)
    ]
    assert found.reshape(-1).tolist() == expected


def test_random_numbers_are_uniform() -> None:
    found = uniform(0, expert="a", name="w", start=0, like=torch.empty(1 << 20))
    counts = torch.histc(found, bins=64, min=0, max=1)
    assert float(((counts - (1 << 14)) ** 2 / (1 << 14)).sum()) == pytest.approx(
        63, abs=4.5 * math.sqrt(126)
    )
    assert float(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1]) == pytest.approx(
        0, abs=0.005
    )
    # Two entries share 64 bits: pairs fill the square evenly, and so do bits behind the first ones.
    even, odd = found[::2], found[1::2]
    for shift in (1, 2**10):
        cells = torch.histc(
            (even * shift % 1 * 16).floor() * 16 + (odd * shift % 1 * 16).floor(),
            bins=256,
            min=0,
            max=256,
        )
        assert float(((cells - (1 << 11)) ** 2 / (1 << 11)).sum()) == pytest.approx(
            255, abs=4.5 * math.sqrt(510)
        )
