"""Locate, merge, then mask: one merged task vector τ⋆ beside the base, and a mask per expert.

Expert i is rebuilt as θ₀ + mᵢ∘τ⋆. A method declares, beside `locating` and `combining`, how its
masks follow (`masking`); see locate_then_merge and mask_rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from mmerge.workers.methods.combine_rules import CombineRule, Election
from mmerge.workers.methods.interface import Block, MergedBlock, TensorFacts
from mmerge.workers.methods.locate_then_merge import (
    COMPILED_PASS,
    Combined,
    Combining,
    LocateAndCombine,
)
from mmerge.workers.methods.mask_rules import MaskRule, MaskSources

_DTYPE_NAMES = {"torch.bfloat16": "BF16", "torch.float16": "F16"}


class Masking(ABC):
    """How the masks of a method follow. Instances have no state."""

    @abstractmethod
    def rules(self, parameters: Any, experts: Sequence[Any]) -> Sequence[MaskRule]:
        """Return the rule of each expert."""

    def revision(self, parameters: Any, experts: Sequence[Any], *, dtype: str) -> int:
        """Return how often the masks of these parameters have changed, see `Method.revision`."""
        rules = self.rules(parameters, experts)
        return max(rule.revision(dtype) for rule in rules)


class Unweighted(Combining):
    """Combining without weights and scale: τ⋆ is stored as it is."""

    @override
    def scale(self, parameters: Any) -> float:
        return 1.0

    @override
    def weights(self, experts: Sequence[Any]) -> tuple[float, ...]:
        return (1.0,) * len(experts)


class ByUnweightedElection(Unweighted):
    """A sign election in which every expert counts alike, by the parameter `reduction`."""

    @override
    def rule(self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]) -> CombineRule:
        return Election(self.weights(experts), parameters.reduction)


class LocateThenMask(LocateAndCombine):
    """τ⋆ and one mask per expert; the base stays beside them."""

    kind = "masks"
    compiled_pass = COMPILED_PASS
    masking: ClassVar[Masking]

    @override
    def revision_in(self, parameters: Any, experts: Sequence[Any], *, dtype: str) -> int:
        revision = super().revision_in(parameters, experts, dtype=dtype)
        if not dtype:
            return revision  # stages measure what comes before the masks
        return revision + self.masking.revision(parameters, experts, dtype=dtype)

    @override
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        combined = self.combine_block(block, parameters, experts)
        stored = combined.merged.to(block.dtype)
        rules = self.masking.rules(parameters, experts)
        masks = make_masks(
            rules,
            block,
            combined,
            stored.to(torch.float32),
            dtype=_DTYPE_NAMES.get(str(block.dtype), "F32"),
        )
        sign = combined.merged.sign() if combined.sign is None else combined.sign
        return MergedBlock(stored, masks, combined.located, sign)


def make_masks(
    rules: Sequence[MaskRule],
    block: Block,
    combined: Combined,
    merged: torch.Tensor,
    *,
    dtype: str = "F32",
) -> list[torch.Tensor]:
    """Return the mask of each expert; `merged` is τ⋆, widened where it is stored in `dtype`."""
    return [
        rule.mask(MaskSources(delta, located, merged, combined.sign, dtype))
        for rule, delta, located in zip(rules, block.task_vectors(), combined.located, strict=True)
    ]
