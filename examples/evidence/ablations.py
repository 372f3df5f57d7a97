"""Ablations of MMER as merge methods, registered for measurements only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from typing_extensions import override

from mmerge.workers.methods import method_names, register_method
from mmerge.workers.methods.interface import Block, MergedBlock
from mmerge.workers.methods.mmer import Mmer, MmerExpertParameters, MmerParameters

MaskRule = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(trimmed task vector, stored merged task vector, mask scale) → boolean mask."""


def without_congruence(
    trimmed: torch.Tensor, merged: torch.Tensor, mask_scale: float
) -> torch.Tensor:
    """Dominant significance alone."""
    return (trimmed.abs() >= (mask_scale * 0.5) * merged.abs()) & (merged != 0)


def without_significance(
    trimmed: torch.Tensor, merged: torch.Tensor, mask_scale: float
) -> torch.Tensor:
    """Directional congruence alone."""
    return (trimmed.sign() == merged.sign()) & (merged != 0)


def euclidean(trimmed: torch.Tensor, merged: torch.Tensor, mask_scale: float) -> torch.Tensor:
    """Return the mask whose m∘τ⋆ is nearest to τᵢ by Euclidean distance.

    There is no mask scale: each bit is set where that reduces the distance.
    """
    return ((merged - trimmed).square() <= trimmed.square()) & (merged != 0)


class _Ablation(Mmer):
    rule: MaskRule

    @override
    def merge_block(
        self, block: Block, parameters: MmerParameters, experts: Sequence[MmerExpertParameters]
    ) -> MergedBlock:
        block_result = super().merge_block(block, parameters, experts)
        assert block_result.trimmed is not None
        scales = [
            parameters.mask_scale if expert.mask_scale is None else expert.mask_scale
            for expert in experts
        ]
        merged = block_result.values.to(torch.float32)
        masks = [
            type(self).rule(trimmed, merged, scale)
            for trimmed, scale in zip(block_result.trimmed, scales, strict=True)
        ]
        return MergedBlock(block_result.values, masks, block_result.trimmed, block_result.sign)


class _WithoutCongruence(_Ablation):
    """MMER without directional congruence."""

    name = "mmer_without_congruence"
    rule = staticmethod(without_congruence)


class _WithoutSignificance(_Ablation):
    """MMER without dominant significance."""

    name = "mmer_without_significance"
    rule = staticmethod(without_significance)


class _Euclidean(_Ablation):
    """MMER with masks by Euclidean distance."""

    name = "mmer_euclidean"
    rule = staticmethod(euclidean)


def register() -> None:
    """Let recipes name the ablations, in this process."""
    for method in (_WithoutCongruence(), _WithoutSignificance(), _Euclidean()):
        if method.name not in method_names():
            register_method(method)
