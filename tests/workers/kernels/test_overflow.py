"""The first θ₀ + τ⋆ that overflows float16 is found, and nothing that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmerge.workers.kernels.overflow import first_sum_overflow
from mmerge.workers.kernels.tiles import CODES, TILE_ENTRIES

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def find_overflow(base: torch.Tensor, delta: torch.Tensor, dtype: str) -> int:
    found = first_sum_overflow(base.data_ptr(), CODES[dtype], delta.data_ptr(), base.numel())
    return int(found)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("position", [0, TILE_ENTRIES - 1, TILE_ENTRIES, 2 * TILE_ENTRIES + 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_overflow_of_a_sum_is_found(dtype: str, position: int, sign: int) -> None:
    base = torch.zeros(2 * TILE_ENTRIES + 7, dtype=DTYPES[dtype])
    delta = torch.zeros(base.shape, dtype=torch.float16)
    assert find_overflow(base, delta, dtype) == -1
    base[position] = sign * 40000.0
    delta[position] = sign * 40000.0
    assert find_overflow(base, delta, dtype) == position
    delta[position] = -sign * 40000.0
    assert find_overflow(base, delta, dtype) == -1


@pytest.mark.parametrize("value", [65504.0, 65519.996, 65520.0, 1e9])
def test_a_sum_overflows_where_rounding_to_float16_does(value: float) -> None:
    base = torch.tensor([1.0, value], dtype=torch.float32)
    delta = torch.zeros(2, dtype=torch.float16)
    with np.errstate(over="ignore"):
        is_infinite = bool(np.isinf(np.float32(value).astype(np.float16)))
    assert find_overflow(base, delta, "F32") == (1 if is_infinite else -1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_task_vector_overflows(value: float) -> None:
    delta = torch.tensor([0.0, 0.0, value], dtype=torch.float16)
    assert find_overflow(torch.zeros(3), delta, "F32") == 2
