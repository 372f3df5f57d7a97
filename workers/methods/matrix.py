"""What all whole-matrix methods have in common: one task per matrix, one thread, and what becomes
of everything else.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.methods.interface import Block, Granularity, MergedBlock, Method, Parameters


class MatrixParameters(Parameters):
    """Parameters that every whole-matrix method has."""

    scale: float = Field(1.0, description="coefficient λ on the merged task vector")
    device: Literal["cpu", "cuda"] = Field(
        "cpu",
        description=(
            "where matrices are merged: 'cuda' needs a GPU for every task, and makes another build,"
            " since its last bits differ"
        ),
    )
    others: Literal["base", "task_arithmetic"] = Field(
        "base",
        description=(
            "embeddings, norms, biases and head: the base's, or θ₀ + λ·Σ τᵢ (then the published"
            " 'average' is scale 1/n)"
        ),
    )


class MatrixMethod(Method):
    """θ = θ₀ + λ·merge(τ₁, …, τₙ) for every matrix of a layer.

    A matrix is merged whole, in float32, on one thread: how a library splits its sums over threads
    decides their last bits.
    """

    kind = "plain"
    parameters_model = MatrixParameters
    task_unit = "tensor"
    uses_math_library = True

    @abstractmethod
    def merge_matrix(self, deltas: Sequence[torch.Tensor], parameters: Any) -> torch.Tensor:
        """Return the merged task vector of one matrix, [out, in], float32, from the experts' task
        vectors.
        """

    @override
    def granularity(self, parameters: Any, experts: Sequence[Any]) -> Granularity:
        return "tensor"

    @override
    def granularity_of(
        self, name: str, shape: Sequence[int], parameters: Any, experts: Sequence[Any]
    ) -> Granularity:
        return "tensor" if is_layer_matrix(name, shape) else "entry"

    @override
    def device(self, parameters: Any) -> str:
        return str(parameters.device)

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        if len(shape) != 2:
            return super().working_bytes(num_entries, num_experts=num_experts, shape=shape)
        # Task vectors, their factors and the workspace of the decomposition, which copies its
        # input; square matrices of the smaller side (singular vectors) or of the input side (C, its
        # eigenvectors and their workspace).
        return 4 * (
            num_entries * (4 * num_experts + 12) + 8 * shape[1] * shape[1] + 8 * min(shape) ** 2
        )

    @override
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        deltas = block.task_vectors()
        if is_layer_matrix(block.name, block.shape):
            merged = self.merge_matrix(deltas, parameters)
        elif parameters.others == "base":
            return MergedBlock(block.base.to(block.dtype))
        else:
            merged = torch.zeros_like(block.base)
            for delta in deltas:
                merged += delta
        return MergedBlock((block.base + parameters.scale * merged).to(block.dtype))


def is_layer_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is a matrix of a layer: no embedding, head, norm or bias."""
    return len(shape) == 2 and layer_of(name) is not None
