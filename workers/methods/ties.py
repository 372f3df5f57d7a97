"""TIES-Merging: trim, elect, disjoint merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.interface import (
    Density,
    Granularity,
    Parameters,
    Scope,
    TensorFacts,
    Trimming,
)
from mmerge.workers.methods.locate_rules import KeepTop, LocateRule, Trim
from mmerge.workers.methods.locate_then_merge import (
    ByElection,
    ElectParameters,
    LocateThenMerge,
    Locating,
    WeightParameters,
)


class TrimParameters(Parameters):
    """Parameters of trimming."""

    density: Density = Field(0.2, description="share of each task vector that is kept")
    scope: Scope = Field(
        "model", description="take the trim threshold over the whole model or per tensor"
    )


class TiesParameters(ElectParameters, TrimParameters):
    """Parameters of TIES."""

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
    """Parameters of TIES per expert."""

    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )


def _densities(parameters: Any, experts: Sequence[Any]) -> tuple[float, ...]:
    return tuple(
        parameters.density if expert.density is None else expert.density for expert in experts
    )


class ThresholdTrim(Locating):
    """Magnitudes at or above each expert's trim threshold, for `TrimParameters` and experts with
    a density.
    """

    @override
    def trimming(self, parameters: Any, experts: Sequence[Any]) -> Trimming | None:
        return Trimming(_densities(parameters, experts), parameters.scope)

    @override
    def rules(
        self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]
    ) -> Sequence[LocateRule]:
        return [Trim(threshold) for threshold in tensor.thresholds]


class TiesTrim(ThresholdTrim):
    """The largest magnitudes, by threshold or by exact count."""

    @override
    def check(self, parameters: TiesParameters, experts: Sequence[TiesExpertParameters]) -> None:
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
    def working_bytes(self, num_entries: int, *, num_experts: int) -> int:
        # Ranks of one task vector as int64, twice, and its masks.
        return num_entries * (16 * num_experts + 48)

    @override
    def rules(
        self,
        tensor: TensorFacts,
        parameters: TiesParameters,
        experts: Sequence[TiesExpertParameters],
    ) -> Sequence[LocateRule]:
        if parameters.count == "threshold":
            return super().rules(tensor, parameters, experts)
        return [
            KeepTop(int(density * tensor.num_entries))
            for density in _densities(parameters, experts)
        ]


class TiesElection(ByElection):
    """Sign election whose majority sign has the scope of the trim threshold."""

    @override
    def scope(self, parameters: TiesParameters) -> Scope:
        return parameters.scope


class Ties(LocateThenMerge):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from trim, elect and disjoint merge."""

    name = "ties"
    source = "TIES-Merging, arXiv 2306.01708"
    parameters_model = TiesParameters
    expert_parameters_model = TiesExpertParameters
    locating = TiesTrim()
    combining = TiesElection()
