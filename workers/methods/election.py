"""Sign election and disjoint merge: what TIES and its descendants do with located task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

DisjointReduction = Literal["mean", "sum", "max"]
ZeroSign = Literal["nothing", "positive", "majority"]


def sum_in_order(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return Σᵢ τᵢ, added in the order given."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


def elect_sign(deltas: Sequence[torch.Tensor], *, zero_sign: float = 0.0) -> torch.Tensor:
    """Return γ = sign(Σᵢ τᵢ), float32 in {−1, 0, 1}, summed in the order given; an exact zero sum
    gets `zero_sign` (0: nothing).

    TIES-Merging (arXiv 2306.01708), section 4, step 2. The official code gives zero sums the
    majority sign, mergekit +1.
    """
    sign = sum_in_order(deltas).sign()
    return torch.where(sign == 0, torch.full_like(sign, zero_sign), sign) if zero_sign else sign


def disjoint_merge(
    deltas: Sequence[torch.Tensor],
    sign: torch.Tensor,
    *,
    reduction: DisjointReduction,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Return τ⋆: per entry the sum, mean or largest magnitude over the task vectors whose sign is
    the elected one, 0 where none is.

    TIES-Merging (arXiv 2306.01708), section 4, step 3. `deltas` are weighted already; the mean
    divides by the sum of the `weights` (1 if absent) of those that agree, and by 1 where that sum
    is 0.
    """
    merged = torch.zeros_like(sign)
    total = torch.zeros_like(sign)
    for index, delta in enumerate(deltas):
        agreeing = torch.where((delta.sign() == sign) & (sign != 0), delta, torch.zeros_like(delta))
        if reduction == "max":
            merged = torch.maximum(merged, agreeing.abs())
            continue
        merged += agreeing
        total += (agreeing != 0) * (1.0 if weights is None else weights[index])
    if reduction == "max":
        return merged * sign
    return (
        merged
        if reduction == "sum"
        else merged / torch.where(total.abs() < 1e-8, torch.ones_like(total), total)
    )
