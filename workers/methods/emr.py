"""EMR-Merging: elect one unified task vector, mask it per expert, rescale what the mask leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from mmerge.workers.methods.combine_rules import CombineRule, Election
from mmerge.workers.methods.interface import Block, Stage, TensorFacts, TensorMeasurements
from mmerge.workers.methods.locate_then_mask import LocateThenMask, Masking, Unweighted
from mmerge.workers.methods.mask_rules import Elected, MaskRule
from mmerge.workers.methods.task_arithmetic import Everything


class Unified(Unweighted):
    """The unified task vector: per entry the largest magnitude among those of the mean's sign.

    EMR-Merging (arXiv 2405.17461), section 3.1. A zero mean counts as negative, as in the official
    code.
    """

    @override
    def rule(self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]) -> CombineRule:
        return Election(self.weights(experts), "max", zero_sign=-1.0)


class ElectedMasks(Masking):
    """Entries whose task vector has the elected sign."""

    @override
    def rules(self, parameters: Any, experts: Sequence[Any]) -> Sequence[MaskRule]:
        return [Elected()] * len(experts)


class Emr(LocateThenMask):
    """τ⋆ = the unified task vector, masks 1{τᵢ·γ > 0}, and a rescaler per expert; expert i is θ₀ +
    rᵢ·mᵢ∘τ⋆.
    """

    name = "emr"
    source = "EMR-Merging, arXiv 2405.17461 (NeurIPS 2024)"
    locating = Everything()
    combining = Unified()
    masking = ElectedMasks()

    @override
    def stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        return (Stage("rescale", "sums", "tensor"),)

    @override
    def measure_block(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        merged = self.merge_block(block, parameters, experts)
        unified = merged.values.to(torch.float32).abs()
        quantities = {f"own.{index}": delta.abs() for index, delta in enumerate(merged.trimmed)}
        for index, mask in enumerate(merged.masks):
            quantities[f"unified.{index}"] = torch.where(mask, unified, torch.zeros_like(unified))
        return quantities

    @override
    def rescalers(
        self, tensors: Sequence[TensorMeasurements], *, num_experts: int
    ) -> tuple[float, ...]:
        """Return rᵢ = Σ_tensors mean|τᵢ| / Σ_tensors mean|mᵢ∘τ⋆|, with τ⋆ as stored; 1 where the
        mask leaves nothing.
        """
        factors = []
        for index in range(num_experts):
            expert_mean = _sum_means(tensors, f"own.{index}")
            unified_mean = _sum_means(tensors, f"unified.{index}")
            factors.append(expert_mean / unified_mean if unified_mean else 1.0)
        return tuple(factors)


def _sum_means(tensors: Sequence[TensorMeasurements], quantity: str) -> float:
    return math.fsum(
        tensor.measured[quantity][0] / max(tensor.num_entries, 1) for tensor in tensors
    )
