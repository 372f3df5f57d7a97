"""DARE: drop entries of the task vectors at random and rescale the rest, then add them or elect
signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, Density, Parameters, Stage
from mmerge.workers.methods.locate import (
    ElectParameters,
    LocateThenElect,
    LocateThenSum,
    SumParameters,
    WeightParameters,
)
from mmerge.workers.methods.randomness import uniform

Rescale = Literal["probability", "norm", "none"]
NORMS = "norms"
"""The stage in which the L1 norms before and after dropping are summed."""


class DropParameters(Parameters):
    """Numbers of random dropping."""

    density: Density = Field(
        0.9,
        description="probability with which an entry is kept, 1 − p (published: p = 0.1 to 0.99)",
    )
    rescale: Rescale = Field(
        "probability",
        description=(
            "what is kept is divided by its keep probability, or scaled so that each tensor's L1"
            " norm is as before (mergekit), or left"
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        description=(
            "seed of the random numbers, which depend on it, the expert's name, the tensor and the"
            " position alone"
        ),
    )


class DropExpertParameters(WeightParameters):
    """Numbers of random dropping per expert."""

    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )


def norm_stages(parameters: DropParameters) -> tuple[Stage, ...]:
    """Return the stage that rescaling by norms needs."""
    return (Stage(NORMS, "sums", "tensor"),) if parameters.rescale == "norm" else ()


def norm_quantities(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the magnitudes of task vectors before and after dropping, to be summed."""
    found = {f"before.{index}": delta.abs() for index, delta in enumerate(before)}
    return found | {f"after.{index}": delta.abs() for index, delta in enumerate(after)}


def restore_norm(delta: torch.Tensor, block: Block, index: int) -> torch.Tensor:
    """Return `delta` scaled so that its tensor's L1 norm is that of expert `index` before dropping;
    unchanged where either is 0.
    """
    before, after = block.known[f"before.{index}"][0], block.known[f"after.{index}"][0]
    return delta * (before / after) if before and after else delta


def drop(
    block: Block, parameters: DropParameters, experts: Sequence[DropExpertParameters]
) -> list[torch.Tensor]:
    """Return the task vectors with entries dropped at random, not rescaled. DARE (arXiv
    2311.03099), section 3.1.
    """
    kept = []
    for delta, density, name in zip(
        block.task_vectors(), densities(parameters, experts), block.expert_names, strict=True
    ):
        chance = uniform(
            parameters.seed, expert=name, name=block.name, start=block.start, like=delta
        )
        kept.append(torch.where(chance < density, delta, torch.zeros_like(delta)))
    return kept


def densities(parameters: DropParameters, experts: Sequence[DropExpertParameters]) -> list[float]:
    """Return each expert's density."""
    return [parameters.density if expert.density is None else expert.density for expert in experts]


def _locate(
    block: Block, parameters: DropParameters, experts: Sequence[DropExpertParameters]
) -> list[torch.Tensor]:
    kept = drop(block, parameters, experts)
    if parameters.rescale == "norm":
        return [restore_norm(delta, block, index) for index, delta in enumerate(kept)]
    if parameters.rescale == "probability":
        return [
            delta / density
            for delta, density in zip(kept, densities(parameters, experts), strict=True)
        ]
    return kept


class DareLinearParameters(DropParameters, SumParameters):
    """Numbers of DARE with task arithmetic."""


class DareTiesParameters(DropParameters, ElectParameters):
    """Numbers of DARE with sign election."""

    reduction: Literal["mean", "sum", "max"] = Field(
        "sum",
        description=(
            "disjoint merge by sum, by mean (over the weights that agree), or largest magnitude"
        ),
    )


class DareLinear(LocateThenSum):
    """θ = θ₀ + λ·Σ wᵢ·Mᵢ∘τᵢ/(1−p) with Mᵢ random."""

    name = "dare_linear"
    source = "DARE, arXiv 2311.03099"
    parameters_model = DareLinearParameters
    expert_parameters_model = DropExpertParameters

    @override
    def stages(self, parameters: DareLinearParameters, experts: Sequence[Any]) -> tuple[Stage, ...]:
        return norm_stages(parameters)

    @override
    def measure_block(
        self, block: Block, parameters: DareLinearParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        return norm_quantities(block.task_vectors(), drop(block, parameters, experts))

    @override
    def locate(
        self, block: Block, parameters: DareLinearParameters, experts: Sequence[Any]
    ) -> list[torch.Tensor]:
        return _locate(block, parameters, experts)


class DareTies(LocateThenElect):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Mᵢ∘τᵢ/(1−p) with Mᵢ random."""

    name = "dare_ties"
    source = "DARE, arXiv 2311.03099, with the election of TIES, arXiv 2306.01708"
    parameters_model = DareTiesParameters
    expert_parameters_model = DropExpertParameters

    @override
    def locate_stages(
        self, parameters: DareTiesParameters, experts: Sequence[Any]
    ) -> tuple[Stage, ...]:
        return norm_stages(parameters)

    @override
    def measure_located(
        self, block: Block, parameters: DareTiesParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        return norm_quantities(block.task_vectors(), drop(block, parameters, experts))

    @override
    def locate(
        self, block: Block, parameters: DareTiesParameters, experts: Sequence[Any]
    ) -> list[torch.Tensor]:
        return _locate(block, parameters, experts)
