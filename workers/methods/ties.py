"""TIES-Merging: trim, elect, disjoint merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.election import disjoint_merge, elect_sign
from mmerge.workers.methods.interface import (
    Block,
    Density,
    Granularity,
    Parameters,
    Scope,
    Trimming,
)
from mmerge.workers.methods.locate import ElectParameters, LocateThenElect, WeightParameters
from mmerge.workers.methods.ranking import top_mask

__all__ = [
    "Ties",
    "TiesExpertParameters",
    "TiesParameters",
    "TrimParameters",
    "disjoint_merge",
    "elect_sign",
    "trim",
]


def trim(delta: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Return `delta` with every entry of magnitude below `threshold` set to 0; ties at the
    threshold stay.

    TIES-Merging (arXiv 2306.01708), section 4, step 1; docs/arithmetic.md.
    """
    return torch.where(
        delta.abs() >= threshold, delta, torch.zeros((), dtype=delta.dtype, device=delta.device)
    )


def trim_exactly(delta: torch.Tensor, *, density: float) -> torch.Tensor:
    """Return `delta` with exactly its int(density·N) largest magnitudes kept; among equals the
    lower position stays.
    """
    return torch.where(
        top_mask(delta.abs(), int(density * delta.numel())), delta, torch.zeros_like(delta)
    )


class TrimParameters(Parameters):
    """Numbers of trimming."""

    density: Density = Field(0.2, description="share of each task vector that is kept")
    scope: Scope = Field(
        "model", description="take the trim threshold over the whole model or per tensor"
    )


class TiesParameters(ElectParameters, TrimParameters):
    """Numbers of TIES."""

    count: Literal["threshold", "exact"] = Field(
        "threshold",
        description=(
            "keep every entry at the threshold, or (scope: tensor) exactly int(density·N), lower"
            " positions first"
        ),
    )
    rounding: Literal["kept", "dropped"] = Field(
        "kept",
        description=(
            "round down the number of kept entries (official code) or of dropped ones (MLLMerging)"
        ),
    )


class TiesExpertParameters(WeightParameters):
    """Numbers of TIES per expert."""

    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )


class Ties(LocateThenElect):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from trim, elect and disjoint merge."""

    name = "ties"
    source = "TIES-Merging, arXiv 2306.01708"
    parameters_model = TiesParameters
    expert_parameters_model = TiesExpertParameters

    @override
    def check_recipe(
        self, parameters: TiesParameters, experts: Sequence[Any], *, has_base: bool
    ) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        if parameters.count == "exact" and (
            parameters.scope != "tensor" or parameters.rounding != "kept"
        ):
            raise RecipeError(
                "count: 'exact' needs 'scope: tensor' and 'rounding: kept'. Add them, or take"
                " 'count: threshold'"
            )

    @override
    def granularity(
        self, parameters: TiesParameters, experts: Sequence[TiesExpertParameters]
    ) -> Granularity:
        return "tensor" if parameters.count == "exact" else "entry"

    @override
    def trimming(
        self, parameters: TiesParameters, experts: Sequence[TiesExpertParameters]
    ) -> Trimming | None:
        if parameters.count == "exact":
            return None
        return Trimming(_densities(parameters, experts), parameters.scope, parameters.rounding)

    @override
    def majority_scope(self, parameters: TiesParameters) -> Scope:
        return parameters.scope

    @override
    def locate(
        self, block: Block, parameters: TiesParameters, experts: Sequence[TiesExpertParameters]
    ) -> list[torch.Tensor]:
        deltas = block.task_vectors()
        if parameters.count == "exact":
            return [
                trim_exactly(delta, density=density)
                for delta, density in zip(deltas, _densities(parameters, experts), strict=True)
            ]
        return [
            trim(delta, threshold=threshold)
            for delta, threshold in zip(deltas, block.thresholds, strict=True)
        ]

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        # Beside what every method takes: ranks of one task vector as int64, twice, and its masks.
        return super().working_bytes(
            num_entries, num_experts=num_experts, shape=shape
        ) + num_entries * (16 * num_experts + 48)


def _densities(
    parameters: TiesParameters, experts: Sequence[TiesExpertParameters]
) -> tuple[float, ...]:
    return tuple(
        parameters.density if expert.density is None else expert.density for expert in experts
    )
