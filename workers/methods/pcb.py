"""PCB-Merging: balance the parameters' competition within each expert and between experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.combine_rules import sum_in_order
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Scope, Stage

MAGNITUDES = "magnitudes"
SCORES = "scores"


class PcbParameters(Parameters):
    """Parameters of PCB-Merging."""

    ratio: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of each expert's entries with the highest scores that is merged",
    )
    scale: float = Field(1.0, description="coefficient λ on the merged task vector")
    clamp_ratio: float = Field(
        1e-4,
        ge=0,
        lt=0.5,
        description="share of the smallest and of the largest magnitudes that is clamped",
    )
    scope: Scope = Field(
        "model", description="take the order statistics over the whole model or per tensor"
    )


class PcbExpertParameters(Parameters):
    """Parameters of PCB-Merging per expert."""

    weight: float = Field(1.0, description="coefficient λ of this expert's task vector")


def intra_balance(
    clamped: torch.Tensor, *, low: float, high: float, num_experts: int
) -> torch.Tensor:
    """Return exp(n·norm(|c|)²) of a clamped task vector, float32; norm maps `low` to 0 and `high`
    to 1.

    PCB-Merging (arXiv 2410.02396), section 3.2. In float64, rounded once, so that the bits do not
    depend on the vector width.
    """
    norm = (clamped.abs() - low) / (high - low) if high > low else torch.zeros_like(clamped)
    return torch.exp(num_experts * (norm**2).to(torch.float64)).to(torch.float32)


def inter_balance(delta: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return tanh(τᵢ∘Σⱼτⱼ) of unclamped task vectors, float32. PCB-Merging, section 3.2."""
    return torch.tanh((delta * total).to(torch.float64)).to(torch.float32)


class Pcb(Method):
    """θ = θ₀ + λ·Σ sᵢwᵢcᵢ / Σ sᵢ; sᵢ are the scores intra∘inter above the `ratio` quantile,
    rescaled to [0, 1], cᵢ clamped τᵢ.
    """

    name = "pcb"
    kind = "plain"
    source = "PCB-Merging, arXiv 2410.02396"
    parameters_model = PcbParameters
    expert_parameters_model = PcbExpertParameters

    @override
    def stages(self, parameters: PcbParameters, experts: Sequence[Any]) -> tuple[Stage, ...]:
        return (
            Stage(MAGNITUDES, "ranks", parameters.scope),
            Stage(SCORES, "ranks", parameters.scope),
        )

    @override
    def ranks(
        self,
        parameters: PcbParameters,
        experts: Sequence[Any],
        *,
        stage: str,
        quantity: str,
        num_entries: int,
    ) -> tuple[int, ...]:
        if stage == MAGNITUDES:
            low, high = (
                int(num_entries * parameters.clamp_ratio),
                int(num_entries * (1 - parameters.clamp_ratio) - 1),
            )
        else:
            low, high = int(num_entries * (1 - parameters.ratio)), num_entries - 1
        return min(low, num_entries - 1) + 1, max(high, 0) + 1

    @override
    def measure_block(
        self, block: Block, parameters: PcbParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        if stage == MAGNITUDES:
            return {
                f"magnitude.{index}": delta.abs()
                for index, delta in enumerate(block.task_vectors())
            }
        return {f"score.{index}": scores for index, scores in enumerate(_scores(block))}

    @override
    def merge_block(
        self, block: Block, parameters: PcbParameters, experts: Sequence[PcbExpertParameters]
    ) -> MergedBlock:
        merged, total = torch.zeros_like(block.base), torch.zeros_like(block.base)
        for index, (scores, expert) in enumerate(zip(_scores(block), experts, strict=True)):
            low, high = block.measured[f"score.{index}"]
            if high > low:
                share = (scores.clamp(low, high) - low) / (high - low)
                merged += share * (expert.weight * _clamp(block, index))
                total += share
        merged /= total.clamp(min=1e-12)
        return MergedBlock((block.base + parameters.scale * merged).to(block.dtype))


def _clamp(block: Block, index: int) -> torch.Tensor:
    """Return the task vector of expert `index` with its magnitudes clamped to their order
    statistics; zeros stay zero.
    """
    delta = block.experts[index] - block.base
    low, high = block.measured[f"magnitude.{index}"]
    return delta.sign() * delta.abs().clamp(low, high)


def _scores(block: Block) -> list[torch.Tensor]:
    deltas = block.task_vectors()
    total = sum_in_order(deltas)
    scores = []
    for index, delta in enumerate(deltas):
        low, high = block.measured[f"magnitude.{index}"]
        clamped = delta.abs().clamp(low, high)
        scores.append(
            intra_balance(clamped, low=low, high=high, num_experts=len(deltas))
            * inter_balance(delta, total)
        )
    return scores
