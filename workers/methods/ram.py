"""RAM and RAM+: average what several experts changed, keep (and amplify) what only one changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Stage


class RamParameters(Parameters):
    """Parameters of RAM."""

    epsilon: float = Field(
        1e-5,
        ge=0,
        description="an entry is changed where its task vector's magnitude is above this",
    )


class RamPlusParameters(RamParameters):
    """Parameters of RAM+."""

    r: float = Field(
        0.1, ge=0, description="how much unique entries are amplified per unit of the overlap ratio"
    )
    alpha: float = Field(0.2, ge=0, description="the overlap ratio counts up to this")


def find_changes(
    deltas: Sequence[torch.Tensor], *, epsilon: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return per expert the mask of changed entries, and how many experts changed each entry."""
    changed = [delta.abs() > epsilon for delta in deltas]
    return changed, torch.stack(changed).sum(dim=0)


def merge_changes(
    deltas: Sequence[torch.Tensor], *, epsilon: float, factors: Sequence[float]
) -> torch.Tensor:
    """Return τ⋆: the mean of the changes where several experts changed an entry, factorᵢ·τᵢ where
    only expert i did.

    Behavior Knowledge Merge in Reinforced Agentic Models (arXiv 2601.13572), section 4.
    """
    changed, count = find_changes(deltas, epsilon=epsilon)
    merged = torch.zeros_like(deltas[0])
    for delta, mask, factor in zip(deltas, changed, factors, strict=True):
        shared = torch.where(
            mask & (count > 1), delta / count.clamp(min=1), torch.zeros_like(delta)
        )
        merged += torch.where(mask & (count == 1), factor * delta, shared)
    return merged


class Ram(Method):
    """θ = θ₀ + τ⋆ with shared changes averaged and unique ones kept whole."""

    name = "ram"
    kind = "plain"
    source = "RAM, arXiv 2601.13572"
    parameters_model = RamParameters

    @override
    def merge_block(
        self, block: Block, parameters: RamParameters, experts: Sequence[Any]
    ) -> MergedBlock:
        merged = merge_changes(
            block.task_vectors(), epsilon=parameters.epsilon, factors=[1.0] * len(experts)
        )
        return MergedBlock((block.base + merged).to(block.dtype))


class RamPlus(Method):
    """RAM with unique changes amplified by 1 + r·min(shared/unique, α), counted per tensor and
    expert.
    """

    name = "ram_plus"
    kind = "plain"
    source = "RAM+ in its tensor-local form, arXiv 2601.13572"
    parameters_model = RamPlusParameters

    @override
    def stages(self, parameters: RamPlusParameters, experts: Sequence[Any]) -> tuple[Stage, ...]:
        return (Stage("changes", "sums", "tensor"),)

    @override
    def measure_block(
        self, block: Block, parameters: RamPlusParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        changed, count = find_changes(block.task_vectors(), epsilon=parameters.epsilon)
        quantities = {
            f"shared.{index}": (mask & (count > 1)).to(torch.float32)
            for index, mask in enumerate(changed)
        }
        return quantities | {
            f"unique.{index}": (mask & (count == 1)).to(torch.float32)
            for index, mask in enumerate(changed)
        }

    @override
    def merge_block(
        self, block: Block, parameters: RamPlusParameters, experts: Sequence[Any]
    ) -> MergedBlock:
        factors = []
        for index in range(len(experts)):
            shared, unique = (
                block.measured[f"shared.{index}"][0],
                block.measured[f"unique.{index}"][0],
            )
            ratio = min(shared / unique, parameters.alpha) if unique else 0.0
            factors.append(1 + parameters.r * ratio)
        merged = merge_changes(block.task_vectors(), epsilon=parameters.epsilon, factors=factors)
        return MergedBlock((block.base + merged).to(block.dtype))
