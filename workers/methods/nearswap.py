"""NearSwap: entries in which base and expert nearly agree are taken from the expert."""

from __future__ import annotations

import torch


def nearswap(base: torch.Tensor, expert: torch.Tensor, *, t: float) -> torch.Tensor:
    """Return base + w·τ with w = min(1, t/|τ|), float32; entries that are equal stay. mergekit's NearSwap."""
    weight = (t / (base - expert).abs()).clamp(max=1.0)
    return weight * expert + (1 - weight) * base
