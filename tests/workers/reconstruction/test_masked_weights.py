"""θ₀ + (Σ factorⱼ·mⱼ / divisor)∘τ⋆ stands in one module per backend, and equals a naive loop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmerge.workers.reconstruction.bitmask import pack_mask
from mmerge.workers.reconstruction.masked_weights import add_masked_tensor

ROOT = Path(__file__).resolve().parents[3]
FORMULA = re.compile(r"\bweights?\b.* / divisor\b.* \* \w+|div_rn\(weights|\bweight \* change")
BACKENDS = {
    "workers/kernels/masked_weights.py",  # numba
    "workers/kernels/masked_weights_triton.py",
    "workers/reconstruction/masked_weights.py",  # torch
}


def test_the_formula_of_masked_weights_stands_in_one_module_per_backend() -> None:
    homes = set()
    for package in ("pipeline", "workers"):
        for path in (ROOT / package).rglob("*.py"):
            if FORMULA.search(path.read_text()):
                homes.add(str(path.relative_to(ROOT)))
    assert homes == BACKENDS


@pytest.mark.parametrize("num_masks", [1, 2, 3])
def test_weights_are_base_plus_mean_mask_times_delta_entry_by_entry(num_masks: int) -> None:
    generator = torch.Generator().manual_seed(num_masks)
    base, delta = torch.randn(2, 5, 7, generator=generator).to(torch.bfloat16)
    masks = [torch.rand(5, 7, generator=generator) < 0.5 for _ in range(num_masks)]
    weight = add_masked_tensor(
        base,
        delta,
        [pack_mask(mask) for mask in masks],
        factors=[1.0] * len(masks),
        dtype=torch.float32,
    )
    for row in range(5):
        for column in range(7):
            share = sum(bool(mask[row, column]) for mask in masks) / num_masks
            assert weight[row, column].item() == pytest.approx(
                base[row, column].item() + share * delta[row, column].item(), abs=1e-6
            )
