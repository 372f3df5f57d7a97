"""Model Breadcrumbs: drop the largest and the smallest magnitudes of every tensor, then add or
elect signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, Density, Granularity, Method, Parameters
from mmerge.workers.methods.locate import (
    ElectParameters,
    LocateThenElect,
    LocateThenSum,
    SumParameters,
    WeightParameters,
)
from mmerge.workers.methods.ranking import top_mask


class BreadcrumbsParameters(Parameters):
    """Numbers of Breadcrumbs."""

    density: Density = Field(0.9, description="share of each tensor's task vector that is kept")
    gamma: float = Field(
        0.01, ge=0, le=1, description="share of each tensor's largest magnitudes that is dropped"
    )


class BreadcrumbsExpertParameters(WeightParameters):
    """Numbers of Breadcrumbs per expert."""

    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )
    gamma: float | None = Field(
        None, ge=0, le=1, description="this expert's gamma, instead of the recipe's"
    )


def drop_outliers(delta: torch.Tensor, *, density: float, gamma: float) -> torch.Tensor:
    """Return `delta` without its int(γN) largest magnitudes, then without the smallest, so that
    int(density·N) are kept.

    Model Breadcrumbs (arXiv 2312.06795), section 3. Where less than int(γN) can be dropped at the
    top, the top gives way; density 1 keeps everything. Of equal magnitudes the lower position
    counts as the larger (our choice).
    """
    if density == 1:
        return delta
    num_entries = delta.numel()
    kept = int(density * num_entries)
    top = min(int(gamma * num_entries), num_entries - kept)
    magnitudes = delta.abs()
    mask = top_mask(magnitudes, top + kept) & ~top_mask(magnitudes, top)
    return torch.where(mask, delta, torch.zeros_like(delta))


class _WholeTensor(Method):
    """What both forms share: exact ranks need the whole tensor."""

    @override
    def granularity(self, parameters: Any, experts: Sequence[Any]) -> Granularity:
        return "tensor"

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        # Beside what every method takes: ranks of one task vector as int64, twice, and its masks.
        return super().working_bytes(
            num_entries, num_experts=num_experts, shape=shape
        ) + num_entries * (8 * num_experts + 64)


def _locate(
    block: Block, parameters: BreadcrumbsParameters, experts: Sequence[BreadcrumbsExpertParameters]
) -> list[torch.Tensor]:
    return [
        drop_outliers(
            delta,
            density=parameters.density if expert.density is None else expert.density,
            gamma=parameters.gamma if expert.gamma is None else expert.gamma,
        )
        for delta, expert in zip(block.task_vectors(), experts, strict=True)
    ]


class BreadcrumbsSumParameters(BreadcrumbsParameters, SumParameters):
    """Numbers of Breadcrumbs by sum."""


class BreadcrumbsTiesParameters(BreadcrumbsParameters, ElectParameters):
    """Numbers of Breadcrumbs with sign election."""

    reduction: Literal["mean", "sum", "max"] = Field(
        "sum",
        description=(
            "disjoint merge by sum, by mean (over the weights that agree), or largest magnitude"
        ),
    )


class Breadcrumbs(_WholeTensor, LocateThenSum):
    """θ = θ₀ + λ·Σ wᵢ·Sub(τᵢ), Sub without the largest and the smallest magnitudes of each tensor."""

    name = "breadcrumbs"
    source = "Model Breadcrumbs, arXiv 2312.06795"
    parameters_model = BreadcrumbsSumParameters
    expert_parameters_model = BreadcrumbsExpertParameters

    @override
    def locate(
        self, block: Block, parameters: BreadcrumbsSumParameters, experts: Sequence[Any]
    ) -> list[torch.Tensor]:
        return _locate(block, parameters, experts)


class BreadcrumbsTies(_WholeTensor, LocateThenElect):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Sub(τᵢ), Sub as in Breadcrumbs."""

    name = "breadcrumbs_ties"
    source = "Model Breadcrumbs, arXiv 2312.06795, with the election of TIES, arXiv 2306.01708"
    parameters_model = BreadcrumbsTiesParameters
    expert_parameters_model = BreadcrumbsExpertParameters

    @override
    def locate(
        self, block: Block, parameters: BreadcrumbsTiesParameters, experts: Sequence[Any]
    ) -> list[torch.Tensor]:
        return _locate(block, parameters, experts)
