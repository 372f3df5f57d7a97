"""TIES-Merging: trim, elect, disjoint merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, Density, MergedBlock, Method, Parameters, Reduction, Scope, Trimming


def trim(delta: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Return `delta` with every entry of magnitude below `threshold` set to 0; ties at the threshold stay.

    TIES-Merging (arXiv 2306.01708), section 4, step 1; METHODS.md section 2.
    """
    return torch.where(delta.abs() >= threshold, delta, torch.zeros((), dtype=delta.dtype, device=delta.device))


def elect_sign(trimmed: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return γ = sign(Σᵢ τᵢ), float32 in {−1, 0, 1}, summed in the order given; an exact zero sum elects nothing.

    TIES-Merging (arXiv 2306.01708), section 4, step 2. The official code gives zero sums the majority sign.
    """
    total = trimmed[0].clone()
    for delta in trimmed[1:]:
        total += delta
    return total.sign()


def disjoint_merge(trimmed: Sequence[torch.Tensor], sign: torch.Tensor, *, reduction: Reduction) -> torch.Tensor:
    """Return τ⋆: per entry the sum or mean over the task vectors whose sign is the elected one, 0 where none is.

    TIES-Merging (arXiv 2306.01708), section 4, step 3.
    """
    merged = torch.zeros_like(sign)
    count = torch.zeros_like(sign)
    for delta in trimmed:
        agrees = (delta.sign() == sign) & (sign != 0)
        merged += torch.where(agrees, delta, torch.zeros_like(delta))
        count += agrees
    return merged if reduction == "sum" else merged / count.clamp(min=1)


class TiesParameters(Parameters):
    """Numbers of TIES."""

    density: Density = Field(0.2, description="share of each task vector that is kept")
    scope: Scope = Field("model", description="take the trim threshold over the whole model or per tensor")
    reduction: Reduction = Field("mean", description="disjoint merge by mean or sum")
    scale: float = Field(1.0, description="coefficient λ on the merged task vector")


class TiesExpertParameters(Parameters):
    """Numbers of TIES per expert."""

    density: Density | None = Field(None, description="this expert's density, instead of the recipe's")


class Ties(Method):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from trim, elect and disjoint merge."""

    name = "ties"
    kind = "plain"
    source = "TIES-Merging, arXiv 2306.01708"
    parameters_model = TiesParameters
    expert_parameters_model = TiesExpertParameters

    @override
    def trimming(self, parameters: TiesParameters, experts: Sequence[TiesExpertParameters]) -> Trimming:
        densities = tuple(parameters.density if expert.density is None else expert.density for expert in experts)
        return Trimming(densities, parameters.scope)

    @override
    def merge_block(self, block: Block, parameters: TiesParameters, experts: Sequence[TiesExpertParameters]) -> MergedBlock:
        trimmed = [trim(delta, threshold=threshold) for delta, threshold in zip(block.task_vectors(), block.thresholds, strict=True)]
        sign = elect_sign(trimmed)
        merged = disjoint_merge(trimmed, sign, reduction=parameters.reduction)
        return MergedBlock((block.base + parameters.scale * merged).to(block.dtype), trimmed=trimmed, sign=sign)
