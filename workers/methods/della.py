"""DELLA: drop entries at random, small magnitudes of a row more often than large ones, then elect
signs or add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.dare import (
    DropExpertParameters,
    DropParameters,
    densities,
    norm_quantities,
    norm_stages,
    restore_norm,
)
from mmerge.workers.methods.interface import Block, Density, Granularity, Method, Stage
from mmerge.workers.methods.locate import (
    ElectParameters,
    LocateThenElect,
    LocateThenSum,
    SumParameters,
)
from mmerge.workers.methods.randomness import uniform


class MagpruneParameters(DropParameters):
    """Numbers of dropping by rank."""

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
    """Numbers of DELLA per expert."""

    epsilon: float | None = Field(
        None, ge=0, lt=0.5, description="this expert's epsilon, instead of the recipe's"
    )


def keep_probabilities(delta: torch.Tensor, *, density: float, epsilon: float) -> torch.Tensor:
    """Return the keep probability of every entry, float32 [rows, columns]: linear in its
    magnitude's rank within its row.

    DELLA (arXiv 2406.11617), section 3.1 (MAGPRUNE). Of equal magnitudes the lower position has the
    lower rank (our choice); a row of one entry has `density`.
    """
    columns = delta.shape[1]
    if columns == 1 or epsilon == 0:
        return torch.full_like(delta, density)
    order = torch.argsort(delta.abs(), dim=1, stable=True)
    steps = torch.arange(columns, dtype=torch.float32, device=delta.device).expand_as(delta)
    ranks = torch.empty_like(delta).scatter_(1, order, steps)
    return (density - epsilon) + ranks / (columns - 1) * (2 * epsilon)


def _drop(
    block: Block,
    parameters: MagpruneParameters,
    experts: Sequence[DellaExpertParameters],
    *,
    divide: bool,
) -> list[torch.Tensor]:
    """Return the task vectors with entries dropped at random, divided by their keep probability
    where asked for.
    """
    kept = []
    epsilons = _epsilons(parameters, experts)
    for delta, density, epsilon, name in zip(
        block.task_vectors(),
        densities(parameters, experts),
        epsilons,
        block.expert_names,
        strict=True,
    ):
        if density == 1:
            kept.append(delta)
            continue
        keep = keep_probabilities(delta, density=density, epsilon=epsilon)
        chance = uniform(
            parameters.seed, expert=name, name=block.name, start=block.start, like=delta
        )
        kept.append(
            torch.where(chance < keep, delta / keep if divide else delta, torch.zeros_like(delta))
        )
    return kept


def _epsilons(
    parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
) -> list[float]:
    return [parameters.epsilon if expert.epsilon is None else expert.epsilon for expert in experts]


def _locate(
    block: Block, parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
) -> list[torch.Tensor]:
    kept = _drop(block, parameters, experts, divide=parameters.rescale == "probability")
    if parameters.rescale == "norm":
        return [restore_norm(delta, block, index) for index, delta in enumerate(kept)]
    return kept


def _measure(
    block: Block, parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]
) -> dict[str, torch.Tensor]:
    return norm_quantities(block.task_vectors(), _drop(block, parameters, experts, divide=False))


def _check(parameters: MagpruneParameters, experts: Sequence[DellaExpertParameters]) -> None:
    for density, epsilon in zip(
        densities(parameters, experts), _epsilons(parameters, experts), strict=True
    ):
        low, high = density - epsilon, density + epsilon
        if density != 1 and (low < 0 or high > 1):
            raise RecipeError(
                f"epsilon: with density {density} keep probabilities would go from {low:g} to"
                f" {high:g}; they must stay within 0 and 1. Take a smaller epsilon"
            )


class DellaLinearParameters(MagpruneParameters, SumParameters):
    """Numbers of DELLA without election."""


class DellaParameters(MagpruneParameters, ElectParameters):
    """Numbers of DELLA."""


class _ByRow(Method):
    """What both forms of DELLA share: ranks need whole rows."""

    expert_parameters_model = DellaExpertParameters

    @override
    def check_recipe(
        self, parameters: MagpruneParameters, experts: Sequence[Any], *, has_base: bool
    ) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        _check(parameters, experts)

    @override
    def granularity(self, parameters: MagpruneParameters, experts: Sequence[Any]) -> Granularity:
        return "row"

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        # Beside what every method takes: order, ranks and probabilities of one expert, random
        # integers, what was kept.
        return super().working_bytes(
            num_entries, num_experts=num_experts, shape=shape
        ) + num_entries * (8 * num_experts + 80)


class DellaLinear(_ByRow, LocateThenSum):
    """θ = θ₀ + λ·Σ wᵢ·Sub(τᵢ) with Sub random, its probabilities by rank within each row."""

    name = "della_linear"
    source = "DELLA-Merging, arXiv 2406.11617, without election"
    parameters_model = DellaLinearParameters
    expert_parameters_model = DellaExpertParameters

    @override
    def stages(
        self, parameters: DellaLinearParameters, experts: Sequence[Any]
    ) -> tuple[Stage, ...]:
        return norm_stages(parameters)

    @override
    def measure_block(
        self, block: Block, parameters: DellaLinearParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        return _measure(block, parameters, experts)

    @override
    def locate(
        self, block: Block, parameters: DellaLinearParameters, experts: Sequence[Any]
    ) -> list[torch.Tensor]:
        return _locate(block, parameters, experts)


class Della(_ByRow, LocateThenElect):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Sub(τᵢ), Sub random, its probabilities by
    rank within each row.
    """

    name = "della"
    source = "DELLA-Merging, arXiv 2406.11617"
    parameters_model = DellaParameters
    expert_parameters_model = DellaExpertParameters

    @override
    def locate_stages(
        self, parameters: DellaParameters, experts: Sequence[Any]
    ) -> tuple[Stage, ...]:
        return norm_stages(parameters)

    @override
    def measure_located(
        self, block: Block, parameters: DellaParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        return _measure(block, parameters, experts)

    @override
    def locate(
        self, block: Block, parameters: DellaParameters, experts: Sequence[Any]
    ) -> list[torch.Tensor]:
        return _locate(block, parameters, experts)
