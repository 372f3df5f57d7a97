"""Combine rules: how located task vectors become one merged task vector.

Each rule is defined twice: `combine` in torch, which is the definition, and `record`, the
parameters of the kernel that computes the same bits (`combine_tile` of workers/kernels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from typing_extensions import override

from mmerge.workers.kernels.locate import ELECT_MAX, ELECT_MEAN, ELECT_SUM, SUM, CombineRecord

DisjointReduction = Literal["mean", "sum", "max"]
_ELECTIONS: Mapping[DisjointReduction, int] = {
    "mean": ELECT_MEAN,
    "sum": ELECT_SUM,
    "max": ELECT_MAX,
}


@dataclass(frozen=True)
class CombineRule(ABC):
    """How the located task vectors of one tensor are combined."""

    weights: tuple[float, ...]
    """Per expert."""

    @abstractmethod
    def combine(self, located: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the merged task vector, float32, and the elected sign in {−1, 0, 1}, None where
        nothing is elected.
        """

    @abstractmethod
    def record(self, *, scale: float) -> CombineRecord:
        """Return what the kernel needs; `scale` multiplies the merged task vector."""

    def weigh(self, located: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return wᵢτᵢ."""
        return [
            delta if weight == 1.0 else weight * delta
            for delta, weight in zip(located, self.weights, strict=True)
        ]

    def _make_record(
        self, kind: int, *, scale: float, zero_sign: float = 0.0, divisor: float = 1.0
    ) -> CombineRecord:
        # torch casts a number beyond float32 to Inf as well, without a warning.
        with np.errstate(over="ignore"):
            weights = tuple(np.float32(weight) for weight in self.weights)
            return CombineRecord(
                kind, weights, np.float32(zero_sign), np.float32(divisor), np.float32(scale)
            )


@dataclass(frozen=True)
class WeightedSum(CombineRule):
    """Σ wᵢτᵢ, divided by Σ wᵢ where asked for and that is not 0."""

    normalize: bool = False

    @property
    def _divisor(self) -> float:
        return (sum(self.weights) or 1.0) if self.normalize else 1.0

    @override
    def combine(self, located: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        total = sum_in_order(self.weigh(located))
        if self._divisor != 1.0:
            total /= self._divisor
        return total, None

    @override
    def record(self, *, scale: float) -> CombineRecord:
        return self._make_record(SUM, scale=scale, divisor=self._divisor)


@dataclass(frozen=True)
class Election(CombineRule):
    """The sign of Σ wᵢτᵢ is elected, and the wᵢτᵢ of that sign are merged (TIES)."""

    reduction: DisjointReduction = "mean"
    zero_sign: float = 0.0
    """The sign that an exact zero sum elects, 0 for none."""

    @override
    def combine(self, located: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        weighted = self.weigh(located)
        sign = elect_sign(weighted, zero_sign=self.zero_sign)
        merged = disjoint_merge(weighted, sign, reduction=self.reduction, weights=self.weights)
        return merged, sign

    @override
    def record(self, *, scale: float) -> CombineRecord:
        kind = _ELECTIONS[self.reduction]
        return self._make_record(kind, scale=scale, zero_sign=self.zero_sign)


def sum_in_order(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return Σᵢ τᵢ, added in the given order."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


def elect_sign(deltas: Sequence[torch.Tensor], *, zero_sign: float = 0.0) -> torch.Tensor:
    """Return γ = sign(Σᵢ τᵢ), float32 in {−1, 0, 1}; an exact zero sum gets `zero_sign` (0: none).

    TIES-Merging (arXiv 2306.01708), section 4, step 2. The official code gives zero sums the
    majority sign, mergekit +1, EMR-Merging −1.
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
    if reduction == "sum":
        return merged
    return merged / torch.where(total.abs() < 1e-8, torch.ones_like(total), total)
