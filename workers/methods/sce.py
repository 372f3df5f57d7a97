"""SCE: select the positions where experts differ most, calculate the experts' weights, erase
minority signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.combine_rules import elect_sign, sum_in_order
from mmerge.workers.methods.interface import Block, Granularity, MergedBlock, Method, Parameters
from mmerge.workers.methods.ranking import top_mask
from mmerge.workers.statistics.exact_sums import exact_sum


class SceParameters(Parameters):
    """Parameters of SCE."""

    select_topk: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each tensor's positions of non-zero variance that is merged",
    )
    scale: float = Field(1.0, description="coefficient λ on the merged task vector")


def select(deltas: Sequence[torch.Tensor], *, select_topk: float) -> torch.Tensor:
    """Return the mask, shape of the tensor, of the positions of largest variance across experts:
    int(share·non-zero variances).

    FuseChat (arXiv 2408.07990), section 3.3, Select. Among equal variances the lower position wins
    (our choice).
    """
    mean = sum_in_order(deltas) / len(deltas)
    variance = sum_in_order([(delta - mean) ** 2 for delta in deltas]) / len(deltas)
    return top_mask(variance, int(int(variance.count_nonzero()) * select_topk))


def matrix_weights(deltas: Sequence[torch.Tensor]) -> list[float]:
    """Return wᵢ = Σ τᵢ² / Σⱼ Σ τⱼ², equal weights where all are zero. FuseChat, section 3.3,
    Calculate.
    """
    squares = [exact_sum(delta**2) for delta in deltas]
    total = sum(squares)
    return [square / total if total else 1 / len(deltas) for square in squares]


class Sce(Method):
    """θ = θ₀ + λ·Σ wᵢeᵢτᵢ / Σ wᵢeᵢ on selected positions; eᵢ erases signs that are not the elected
    one.
    """

    name = "sce"
    kind = "plain"
    source = "FuseChat (SCE), arXiv 2408.07990"
    parameters_model = SceParameters
    compiled_pass = "mmerge.workers.compiled.sce:ScePass"

    @override
    def granularity(self, parameters: SceParameters, experts: Sequence[Any]) -> Granularity:
        return "tensor"

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        return super().working_bytes(
            num_entries, num_experts=num_experts, shape=shape
        ) + num_entries * (8 * num_experts + 64)

    @override
    def merge_block(
        self, block: Block, parameters: SceParameters, experts: Sequence[Any]
    ) -> MergedBlock:
        deltas = block.task_vectors()
        if parameters.select_topk < 1:
            selected = select(deltas, select_topk=parameters.select_topk)
            deltas = [torch.where(selected, delta, torch.zeros_like(delta)) for delta in deltas]
        sign = elect_sign(deltas, zero_sign=1.0)
        total, weights = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(deltas, matrix_weights(deltas), strict=True):
            agrees = delta.sign() == sign
            total += torch.where(agrees, weight * delta, torch.zeros_like(delta))
            weights += agrees * weight
        merged = total / torch.where(weights == 0, torch.ones_like(weights), weights)
        return MergedBlock(
            (block.base + parameters.scale * merged).to(block.dtype), trimmed=deltas, sign=sign
        )
