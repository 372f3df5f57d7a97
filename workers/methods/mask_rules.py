"""Mask rules: which entries of the merged task vector belong to an expert.

Each rule is defined twice: `mask` in torch, which is the definition, and `kind` and `scale`, the
parameters of the kernel that computes the same bits (`mask_tile` of workers/kernels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mmerge.workers.kernels.masks import ELECTED, NEARER, SIGNIFICANT


@dataclass(frozen=True)
class MaskSources:
    """What the mask of one expert may depend on: tensors of one block, float32."""

    delta: torch.Tensor
    """The expert's task vector."""
    located: torch.Tensor
    """What of it is located."""
    merged: torch.Tensor
    """The merged task vector; in a masks build as stored, so that masks fit the bytes on disk."""
    sign: torch.Tensor | None
    """The elected sign, where one is elected."""


class MaskRule(ABC):
    """Which entries of the merged task vector belong to one expert."""

    kind: ClassVar[int]
    """The kind of MaskRecord."""

    @property
    def scale(self) -> float:
        """The scale of MaskRecord."""
        return 1.0

    @abstractmethod
    def mask(self, sources: MaskSources) -> torch.Tensor:
        """Return the mask, boolean, shape of the block."""


@dataclass(frozen=True)
class Significant(MaskRule):
    """The modality mask of MMER, see `decouple`."""

    mask_scale: float
    kind = SIGNIFICANT

    @property
    @override
    def scale(self) -> float:
        return self.mask_scale * 0.5

    @override
    def mask(self, sources: MaskSources) -> torch.Tensor:
        return decouple(sources.located, sources.merged, mask_scale=self.mask_scale)


@dataclass(frozen=True)
class Nearer(MaskRule):
    """The task mask of TALL-masks, see `task_mask`; of the task vector before trimming."""

    mask_scale: float
    kind = NEARER

    @property
    @override
    def scale(self) -> float:
        return self.mask_scale

    @override
    def mask(self, sources: MaskSources) -> torch.Tensor:
        return task_mask(sources.delta, sources.merged, mask_scale=self.mask_scale)


@dataclass(frozen=True)
class Elected(MaskRule):
    """1{τᵢ·γ > 0} with the elected sign γ ≠ 0. EMR-Merging (arXiv 2405.17461), section 3.1."""

    kind = ELECTED

    @override
    def mask(self, sources: MaskSources) -> torch.Tensor:
        assert sources.sign is not None, "masks by sign need an election"
        return sources.located.sign() == sources.sign


def decouple(trimmed: torch.Tensor, merged: torch.Tensor, *, mask_scale: float) -> torch.Tensor:
    """Return the modality mask of one expert, boolean, shape of `merged`.

    1 where both tests hold: dominant significance |τᵢ| ≥ λᵢ·0.5·|τ⋆|, and directional congruence
    sign(τᵢ) = sign(τ⋆) ≠ 0. MMER (arXiv 2505.17110), see docs/arithmetic.md, MMER, step 4.

    Args:
        trimmed: the expert's trimmed task vector, float32.
        merged: τ⋆ as stored, widened to float32, so that the mask is right for the bytes on disk.
        mask_scale: λᵢ.
    """
    dominant = trimmed.abs() >= (mask_scale * 0.5) * merged.abs()
    congruent = (trimmed.sign() == merged.sign()) & (merged != 0)
    return dominant & congruent


def task_mask(delta: torch.Tensor, merged: torch.Tensor, *, mask_scale: float) -> torch.Tensor:
    """Return 1{|τᵢ| > λᵢ·|τ_MT − τᵢ|}, boolean, strictly. TALL-masks (arXiv 2405.07813), eq. 4."""
    return delta.abs() > mask_scale * (merged - delta).abs()
