"""EMR-Merging: elect one unified task vector, mask it per expert, rescale what the mask leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from mmerge.workers.methods.election import sum_in_order
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Stage, TensorKnown


def unify(deltas: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unified task vector and the elected sign: per entry the largest magnitude among
    those of the mean's sign.

    EMR-Merging (arXiv 2405.17461), section 3.1. A zero mean counts as negative, as in the official
    code.
    """
    total = sum_in_order(deltas)
    sign = torch.where(total > 0, torch.ones_like(total), -torch.ones_like(total))
    largest = torch.zeros_like(total)
    for delta in deltas:
        largest = torch.maximum(
            largest, torch.where(delta.sign() == sign, delta.abs(), torch.zeros_like(delta))
        )
    return largest * sign, sign


class Emr(Method):
    """τ⋆ = the unified task vector, masks 1{τᵢ·γ > 0}, and a rescaler per expert; expert i is θ₀ +
    rᵢ·mᵢ∘τ⋆.
    """

    name = "emr"
    kind = "masks"
    source = "EMR-Merging, arXiv 2405.17461 (NeurIPS 2024)"

    @override
    def stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        return (Stage("rescale", "sums", "tensor"),)

    @override
    def measure_block(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        merged = self.merge_block(block, parameters, experts)
        unified = merged.values.to(torch.float32).abs()
        found = {f"own.{index}": delta.abs() for index, delta in enumerate(merged.trimmed)}
        return found | {
            f"unified.{index}": torch.where(mask, unified, torch.zeros_like(unified))
            for index, mask in enumerate(merged.masks)
        }

    @override
    def rescalers(self, tensors: Sequence[TensorKnown], *, num_experts: int) -> tuple[float, ...]:
        """Return rᵢ = Σ_tensors mean|τᵢ| / Σ_tensors mean|mᵢ∘τ⋆|, with τ⋆ as stored; 1 where the
        mask leaves nothing.
        """
        factors = []
        for index in range(num_experts):
            own = math.fsum(
                tensor.known[f"own.{index}"][0] / max(tensor.num_entries, 1) for tensor in tensors
            )
            unified = math.fsum(
                tensor.known[f"unified.{index}"][0] / max(tensor.num_entries, 1)
                for tensor in tensors
            )
            factors.append(own / unified if unified else 1.0)
        return tuple(factors)

    @override
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        deltas = block.task_vectors()
        unified, sign = unify(deltas)
        return MergedBlock(
            unified.to(block.dtype), [delta.sign() == sign for delta in deltas], deltas, sign
        )
