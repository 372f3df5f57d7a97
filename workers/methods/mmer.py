"""MMER: merge, then decouple. One merged task vector, and a mask per modality that keeps each
expert recoverable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.election import disjoint_merge, elect_sign
from mmerge.workers.methods.interface import (
    Block,
    Density,
    MergedBlock,
    Method,
    Parameters,
    Reduction,
    Scope,
    Trimming,
)
from mmerge.workers.methods.ties import trim


def decouple(trimmed: torch.Tensor, merged: torch.Tensor, *, mask_scale: float) -> torch.Tensor:
    """Return the modality mask of one expert, boolean, shape of `merged`.

    1 where both tests hold: dominant significance |τᵢ| ≥ λᵢ·0.5·|τ⋆|, and directional congruence
    sign(τᵢ) = sign(τ⋆) ≠ 0. MMER (arXiv 2505.17110), docs/arithmetic.md, step 4.

    Args:
        trimmed: the expert's trimmed task vector, float32.
        merged: τ⋆ as stored, widened to float32, so that the mask is right for the bytes on disk.
        mask_scale: λᵢ.
    """
    dominant = trimmed.abs() >= (mask_scale * 0.5) * merged.abs()
    congruent = (trimmed.sign() == merged.sign()) & (merged != 0)
    return dominant & congruent


class MmerParameters(Parameters):
    """Parameters of MMER; sum and scope `model` are our choices (docs/arithmetic.md)."""

    density: Density = Field(
        0.8, description="share of each task vector that is kept (published: 0.8)"
    )
    scope: Scope = Field(
        "model", description="take the trim threshold over the whole model or per tensor"
    )
    reduction: Reduction = Field("sum", description="disjoint merge by sum (our choice) or mean")
    mask_scale: float = Field(
        0.75,
        gt=0,
        le=10,
        description="λ of every expert that gives none (our choice: 0.75; usable 0.6 to 0.9)",
    )


class MmerExpertParameters(Parameters):
    """Numbers of MMER per expert."""

    mask_scale: float | None = Field(
        None, gt=0, le=10, description="this expert's λ, instead of the recipe's"
    )
    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )


class Mmer(Method):
    """τ⋆ from trim, elect and disjoint merge, then one mask per expert; the base stays beside them."""

    name = "mmer"
    kind = "masks"
    source = "MMER, arXiv 2505.17110 (ACL 2025)"
    parameters_model = MmerParameters
    expert_parameters_model = MmerExpertParameters

    @override
    def trimming(
        self, parameters: MmerParameters, experts: Sequence[MmerExpertParameters]
    ) -> Trimming:
        densities = tuple(
            parameters.density if expert.density is None else expert.density for expert in experts
        )
        return Trimming(densities, parameters.scope)

    @override
    def merge_block(
        self, block: Block, parameters: MmerParameters, experts: Sequence[MmerExpertParameters]
    ) -> MergedBlock:
        trimmed = [
            trim(delta, threshold=threshold)
            for delta, threshold in zip(block.task_vectors(), block.thresholds, strict=True)
        ]
        sign = elect_sign(trimmed)
        stored = disjoint_merge(trimmed, sign, reduction=parameters.reduction).to(block.dtype)
        merged = stored.to(torch.float32)
        scales = [
            parameters.mask_scale if expert.mask_scale is None else expert.mask_scale
            for expert in experts
        ]
        masks = [
            decouple(delta, merged, mask_scale=scale)
            for delta, scale in zip(trimmed, scales, strict=True)
        ]
        return MergedBlock(stored, masks, trimmed, sign)
