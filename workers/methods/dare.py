"""DARE: drop entries of the task vectors at random and rescale the rest, then add them or elect
signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, Density, Parameters, Stage, TensorFacts
from mmerge.workers.methods.locate_rules import DropAtRandom, LocateRule, Stream
from mmerge.workers.methods.locate_then_merge import (
    ByElection,
    BySum,
    ElectParameters,
    LocateThenMerge,
    Locating,
    SumParameters,
    WeightParameters,
)

Rescale = Literal["probability", "norm", "none"]
NORMS = "norms"
"""The stage in which the L1 norms before and after dropping are summed."""


class DropParameters(Parameters):
    """Parameters of random dropping."""

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
    """Parameters of random dropping per expert."""

    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )


def densities(parameters: DropParameters, experts: Sequence[DropExpertParameters]) -> list[float]:
    """Return each expert's density."""
    return [parameters.density if expert.density is None else expert.density for expert in experts]


class RescaledDrop(Locating):
    """Random dropping whose kept entries may be rescaled by L1 norms."""

    @override
    def stages(
        self, parameters: DropParameters, experts: Sequence[DropExpertParameters]
    ) -> tuple[Stage, ...]:
        return (Stage(NORMS, "sums", "tensor"),) if parameters.rescale == "norm" else ()

    @override
    def measure(
        self,
        block: Block,
        parameters: DropParameters,
        experts: Sequence[DropExpertParameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        """Return the magnitudes of task vectors before and after dropping, to be summed."""
        unscaled = parameters.model_copy(update={"rescale": "none"})
        quantities: dict[str, torch.Tensor] = {}
        rules = self.rules(block.facts, unscaled, experts)
        for index, (rule, delta) in enumerate(zip(rules, block.task_vectors(), strict=True)):
            quantities[f"before.{index}"] = delta.abs()
            quantities[f"after.{index}"] = rule.locate(delta, start=block.start).abs()
        return quantities


def norm_factor(tensor: TensorFacts, parameters: DropParameters, index: int) -> float:
    """Return the factor that restores the L1 norm of expert `index`: 1 where the recipe does not
    ask for that, or either norm is 0.
    """
    if parameters.rescale != "norm":
        return 1.0
    before = tensor.measured[f"before.{index}"][0]
    after = tensor.measured[f"after.{index}"][0]
    return before / after if before and after else 1.0


class RandomDrop(RescaledDrop):
    """Every entry is kept with the expert's density as probability."""

    @override
    def rules(
        self,
        tensor: TensorFacts,
        parameters: DropParameters,
        experts: Sequence[DropExpertParameters],
    ) -> Sequence[LocateRule]:
        divides = parameters.rescale == "probability"
        return [
            DropAtRandom(
                density=density,
                divisor=density if divides else 1.0,
                factor=norm_factor(tensor, parameters, index),
                stream=Stream(parameters.seed, name, tensor.name),
            )
            for index, (density, name) in enumerate(
                zip(densities(parameters, experts), tensor.expert_names, strict=True)
            )
        ]


class DareLinearParameters(DropParameters, SumParameters):
    """Parameters of DARE with task arithmetic."""


class DareTiesParameters(DropParameters, ElectParameters):
    """Parameters of DARE with sign election."""

    reduction: Literal["mean", "sum", "max"] = Field(
        "sum",
        description=(
            "disjoint merge by sum, by mean (over the weights that agree), or largest magnitude"
        ),
    )


class DareLinear(LocateThenMerge):
    """θ = θ₀ + λ·Σ wᵢ·Mᵢ∘τᵢ/(1−p) with Mᵢ random."""

    name = "dare_linear"
    source = "DARE, arXiv 2311.03099"
    parameters_model = DareLinearParameters
    expert_parameters_model = DropExpertParameters
    locating = RandomDrop()
    combining = BySum()


class DareTies(LocateThenMerge):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Mᵢ∘τᵢ/(1−p) with Mᵢ random."""

    name = "dare_ties"
    source = "DARE, arXiv 2311.03099, with the election of TIES, arXiv 2306.01708"
    parameters_model = DareTiesParameters
    expert_parameters_model = DropExpertParameters
    locating = RandomDrop()
    combining = ByElection()
