"""Model Breadcrumbs: drop the largest and the smallest magnitudes of every tensor, then add or
elect signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Density, Granularity, Parameters, TensorFacts
from mmerge.workers.methods.locate_rules import KeepAll, KeepTop, LocateRule
from mmerge.workers.methods.locate_then_merge import (
    ByElection,
    BySum,
    ElectParameters,
    LocateThenMerge,
    Locating,
    SumParameters,
    WeightParameters,
)


class BreadcrumbsParameters(Parameters):
    """Parameters of Breadcrumbs."""

    density: Density = Field(0.9, description="share of each tensor's task vector that is kept")
    gamma: float = Field(
        0.01, ge=0, le=1, description="share of each tensor's largest magnitudes that is dropped"
    )


class BreadcrumbsExpertParameters(WeightParameters):
    """Parameters of Breadcrumbs per expert."""

    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )
    gamma: float | None = Field(
        None, ge=0, le=1, description="this expert's gamma, instead of the recipe's"
    )


def middle_rule(num_entries: int, *, density: float, gamma: float) -> LocateRule:
    """Return the rule that drops the int(γN) largest magnitudes, then the smallest, so that
    int(density·N) are kept.

    Model Breadcrumbs (arXiv 2312.06795), section 3. Where fewer than int(γN) can be dropped at the
    top, the top gives way; density 1 keeps everything.
    """
    if density == 1:
        return KeepAll()
    num_kept = int(density * num_entries)
    num_outliers = min(int(gamma * num_entries), num_entries - num_kept)
    return KeepTop(num_outliers + num_kept, num_outliers)


class MiddleMagnitudes(Locating):
    """The magnitudes between outliers and noise are kept, by exact ranks within a tensor."""

    @override
    def granularity(
        self, parameters: BreadcrumbsParameters, experts: Sequence[BreadcrumbsExpertParameters]
    ) -> Granularity:
        return "tensor"

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int) -> int:
        # Ranks of one task vector as int64, twice, and its masks.
        return num_entries * (8 * num_experts + 64)

    @override
    def rules(
        self,
        tensor: TensorFacts,
        parameters: BreadcrumbsParameters,
        experts: Sequence[BreadcrumbsExpertParameters],
    ) -> Sequence[LocateRule]:
        return [
            middle_rule(
                tensor.num_entries,
                density=parameters.density if expert.density is None else expert.density,
                gamma=parameters.gamma if expert.gamma is None else expert.gamma,
            )
            for expert in experts
        ]


class BreadcrumbsSumParameters(BreadcrumbsParameters, SumParameters):
    """Parameters of Breadcrumbs by sum."""


class BreadcrumbsTiesParameters(BreadcrumbsParameters, ElectParameters):
    """Parameters of Breadcrumbs with sign election."""

    reduction: Literal["mean", "sum", "max"] = Field(
        "sum",
        description=(
            "disjoint merge by sum, by mean (over the weights that agree), or largest magnitude"
        ),
    )


class Breadcrumbs(LocateThenMerge):
    """θ = θ₀ + λ·Σ wᵢ·Sub(τᵢ), Sub without the largest and smallest magnitudes of each tensor."""

    name = "breadcrumbs"
    source = "Model Breadcrumbs, arXiv 2312.06795"
    parameters_model = BreadcrumbsSumParameters
    expert_parameters_model = BreadcrumbsExpertParameters
    locating = MiddleMagnitudes()
    combining = BySum()


class BreadcrumbsTies(LocateThenMerge):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Sub(τᵢ), Sub as in Breadcrumbs."""

    name = "breadcrumbs_ties"
    source = "Model Breadcrumbs, arXiv 2312.06795, with the election of TIES, arXiv 2306.01708"
    parameters_model = BreadcrumbsTiesParameters
    expert_parameters_model = BreadcrumbsExpertParameters
    locating = MiddleMagnitudes()
    combining = ByElection()
