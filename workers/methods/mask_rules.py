"""Mask rules: which entries of the merged task vector belong to an expert.

Each rule is defined twice: `mask` in torch, which is the definition, and `kind` and `factor`, the
parameters of the kernel that computes the same bits (`mask_tile` of workers/kernels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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
    dtype: str = "F32"
    """The dtype of `merged` as it is stored, by its name in safetensors."""


class MaskRule(ABC):
    """Which entries of the merged task vector belong to one expert."""

    kind: ClassVar[int]
    """The kind of MaskRecord."""

    def factor(self, dtype: str) -> float:
        """Return the scale of MaskRecord, for τ⋆ stored in `dtype`."""
        return 1.0

    def revision(self, dtype: str) -> int:
        """Return how often the masks beside a τ⋆ of this dtype have changed."""
        return 0

    @abstractmethod
    def mask(self, sources: MaskSources) -> torch.Tensor:
        """Return the mask, boolean, shape of the block."""


@dataclass(frozen=True)
class Significant(MaskRule):
    """The modality mask of MMER, see `decouple`."""

    mask_scale: float
    kind = SIGNIFICANT

    @override
    def factor(self, dtype: str) -> float:
        return significance_factor(self.mask_scale, dtype=dtype)

    @override
    def revision(self, dtype: str) -> int:
        # The first comparison was in float32, where the product decided ties unless it was exact.
        return 0 if is_short(self.mask_scale, dtype) else 1

    @override
    def mask(self, sources: MaskSources) -> torch.Tensor:
        return decouple(
            sources.located, sources.merged, mask_scale=self.mask_scale, dtype=sources.dtype
        )


@dataclass(frozen=True)
class Nearer(MaskRule):
    """The task mask of TALL-masks, see `task_mask`; of the task vector before trimming."""

    mask_scale: float
    kind = NEARER

    @override
    def factor(self, dtype: str) -> float:
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


_TIE_WIDTH = 2.0**-50
"""Relative distance within which two sides of a comparison count as equal.

It covers the rounding of λ to float64 and of one product, 2⁻⁵² together. No ratio of two float32
significands that differs from λ/2 is so near to it while λ has at most six decimals: with λ/2 =
L/(2·10⁶) the difference of m₁/m₂ from it is at least 1/(m₂·2·10⁶), relative to it 2⁻⁴⁷ or more.
"""
_FLOAT32_TIE_WIDTH = 2.0**-24
"""The same where τ⋆ is a float32, and may itself be rounded by half a unit in its last place.

A mean of three is: without this, rounding would decide whether an entry at the limit is in.
"""
_SIGNIFICANT_BITS: Mapping[str, int] = {"BF16": 8, "F16": 11}


def significance_factor(mask_scale: float, *, dtype: str) -> float:
    """Return c such that |τ| ≥ c·|τ⋆| in float64 where |τ| ≥ λ/2·|τ⋆| for the λ as it is written.

    An entry exactly at the limit is in, although λ = 0.6, say, is no binary number. `dtype` is that
    of the stored τ⋆.
    """
    width = _FLOAT32_TIE_WIDTH if dtype == "F32" else _TIE_WIDTH
    return mask_scale * 0.5 * (1.0 - width)


def is_short(mask_scale: float, dtype: str) -> bool:
    """Return whether float32 holds λ/2·|τ⋆| exactly for every τ⋆ of a dtype of 16 bits.

    The comparison in float32, which is faster, then gives the same bits.
    """
    if dtype not in _SIGNIFICANT_BITS:
        return False
    numerator = (mask_scale * 0.5).as_integer_ratio()[0]
    return numerator.bit_length() + _SIGNIFICANT_BITS[dtype] <= 24


def decouple(
    trimmed: torch.Tensor, merged: torch.Tensor, *, mask_scale: float, dtype: str = "F32"
) -> torch.Tensor:
    """Return the modality mask of one expert, boolean, shape of `merged`.

    1 where both tests hold: dominant significance |τᵢ| ≥ λᵢ·0.5·|τ⋆|, and directional congruence
    sign(τᵢ) = sign(τ⋆) ≠ 0. MMER (arXiv 2505.17110), see docs/arithmetic.md, MMER, step 4.

    Args:
        trimmed: the expert's trimmed task vector, float32.
        merged: τ⋆ as stored, widened to float32, so that the mask is right for the bytes on disk.
        mask_scale: λᵢ.
        dtype: of the stored τ⋆, by its name in safetensors.
    """
    factor = significance_factor(mask_scale, dtype=dtype)
    limits = merged.abs().to(torch.float64).mul_(factor)
    dominant = trimmed.abs().to(torch.float64) >= limits
    congruent = (trimmed.sign() == merged.sign()) & (merged != 0)
    return dominant & congruent


def task_mask(delta: torch.Tensor, merged: torch.Tensor, *, mask_scale: float) -> torch.Tensor:
    """Return 1{|τᵢ| > λᵢ·|τ_MT − τᵢ|}, boolean, strictly. TALL-masks (arXiv 2405.07813), eq. 4."""
    return delta.abs() > mask_scale * (merged - delta).abs()
