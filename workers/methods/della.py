"""DELLA: drop entries at random, small magnitudes of a row more often than large ones, then elect
signs or add.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.dare import (
    DropExpertParameters,
    DropParameters,
    RescaledDrop,
    densities,
    norm_factor,
)
from mmerge.workers.methods.interface import Density, Granularity, TensorFacts
from mmerge.workers.methods.locate_rules import DropByRank, KeepAll, LocateRule, Stream
from mmerge.workers.methods.locate_then_merge import (
    ByElection,
    BySum,
    ElectParameters,
    LocateThenMerge,
    SumParameters,
)


class MagpruneParameters(DropParameters):
    """Parameters of dropping by rank."""

    density: Density = Field(0.5, description="mean probability with which an entry is kept")
    epsilon: float = Field(
        0.15,
        ge=0,
        lt=0.5,
        description=(
            "keep probabilities go from density − ε (a row's smallest magnitude) to density + ε"
            " (its largest)"
        ),
    )


class DellaExpertParameters(DropExpertParameters):
    """Parameters of DELLA per expert."""

    epsilon: float | None = Field(
        None, ge=0, lt=0.5, description="this expert's epsilon, instead of the recipe's"
    )


def _epsilons(
    parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
) -> list[float]:
    return [parameters.epsilon if expert.epsilon is None else expert.epsilon for expert in experts]


class RankedDrop(RescaledDrop):
    """The keep probability of an entry follows from the rank of its magnitude within its row."""

    @override
    def check(
        self, parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
    ) -> None:
        for density, epsilon in zip(
            densities(parameters, experts), _epsilons(parameters, experts), strict=True
        ):
            low, high = density - epsilon, density + epsilon
            if density != 1 and (low < 0 or high > 1):
                raise RecipeError(
                    f"epsilon: with density {density} keep probabilities would go from {low:g} to"
                    f" {high:g}; they must stay within 0 and 1. Take a smaller epsilon"
                )

    @override
    def granularity(
        self, parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
    ) -> Granularity:
        return "row"

    @override
    def revision(
        self, parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
    ) -> int:
        # The first compiled pass took the recipe's epsilon for every expert.
        epsilons = set(_epsilons(parameters, experts))
        return 0 if epsilons == {parameters.epsilon} else 1

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int) -> int:
        # Order, ranks and probabilities of one expert, random integers, what was kept.
        return num_entries * (8 * num_experts + 80)

    @override
    def rules(
        self,
        tensor: TensorFacts,
        parameters: MagpruneParameters,
        experts: Sequence[DellaExpertParameters],
    ) -> Sequence[LocateRule]:
        rules: list[LocateRule] = []
        epsilons = _epsilons(parameters, experts)
        for index, density in enumerate(densities(parameters, experts)):
            if density == 1:
                rules.append(KeepAll())
                continue
            rule = DropByRank(
                density=density,
                epsilon=epsilons[index],
                divides=parameters.rescale == "probability",
                factor=norm_factor(tensor, parameters, index),
                stream=Stream(parameters.seed, tensor.expert_names[index], tensor.name),
            )
            rules.append(rule)
        return rules


class DellaLinearParameters(MagpruneParameters, SumParameters):
    """Parameters of DELLA without election."""


class DellaParameters(MagpruneParameters, ElectParameters):
    """Parameters of DELLA."""


class DellaLinear(LocateThenMerge):
    """θ = θ₀ + λ·Σ wᵢ·Sub(τᵢ) with Sub random, its probabilities by rank within each row."""

    name = "della_linear"
    source = "DELLA-Merging, arXiv 2406.11617, without election"
    parameters_model = DellaLinearParameters
    expert_parameters_model = DellaExpertParameters
    locating = RankedDrop()
    combining = BySum()


class Della(LocateThenMerge):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Sub(τᵢ), Sub random, its probabilities by
    rank within each row.
    """

    name = "della"
    source = "DELLA-Merging, arXiv 2406.11617"
    parameters_model = DellaParameters
    expert_parameters_model = DellaExpertParameters
    locating = RankedDrop()
    combining = ByElection()
