"""NuSLERP: spherical interpolation with weights, of whole tensors, rows or columns, of weights or
of task vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.interface import (
    Block,
    Granularity,
    MergedBlock,
    Method,
    Parameters,
    Stage,
)
from mmerge.workers.methods.sphere import (
    combine,
    gram,
    gram_stage,
    measure_products,
    nuslerp_coefficients,
    read_gram,
)

Origin = Literal["base", "zero"]
"""Where the sphere has its centre: at the base (task vectors are rotated), or at zero (weights
are).
"""


class NuslerpParameters(Parameters):
    """Parameters of NuSLERP."""

    origin: Origin = Field(
        "base", description="rotate the task vectors ('base') or the weights themselves ('zero')"
    )
    along: Literal["tensor", "rows", "columns"] = Field(
        "tensor",
        description=(
            "one rotation per tensor, per row (mergekit: nuslerp_flatten false), or per column"
            " (nuslerp_row_wise true)"
        ),
    )


class NuslerpExpertParameters(Parameters):
    """Parameters of NuSLERP per expert."""

    weight: float = Field(1.0, description="weight of this expert: the second one's share is t")


class Nuslerp(Method):
    """Interpolate two experts along the arc, at t = w₂ / (w₁ + w₂)."""

    name = "nuslerp"
    kind = "plain"
    source = "mergekit, NuSLERP"
    parameters_model = NuslerpParameters
    expert_parameters_model = NuslerpExpertParameters
    min_experts = 2
    max_experts = 2
    needs_base = False

    @override
    def check_recipe(
        self,
        parameters: NuslerpParameters,
        experts: Sequence[NuslerpExpertParameters],
        *,
        has_base: bool,
    ) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        check_origin(self.name, parameters.origin, has_base=has_base)

    @override
    def granularity(
        self, parameters: NuslerpParameters, experts: Sequence[NuslerpExpertParameters]
    ) -> Granularity:
        by_direction: dict[str, Granularity] = {
            "tensor": "entry",
            "rows": "row",
            "columns": "tensor",
        }
        return by_direction[parameters.along]

    @override
    def stages(
        self, parameters: NuslerpParameters, experts: Sequence[NuslerpExpertParameters]
    ) -> tuple[Stage, ...]:
        return (
            (gram_stage(from_base=parameters.origin == "base"),)
            if parameters.along == "tensor"
            else ()
        )

    @override
    def measure_block(
        self,
        block: Block,
        parameters: NuslerpParameters,
        experts: Sequence[NuslerpExpertParameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        return measure_products(vectors_around(block, parameters.origin))

    @override
    def merge_block(
        self,
        block: Block,
        parameters: NuslerpParameters,
        experts: Sequence[NuslerpExpertParameters],
    ) -> MergedBlock:
        total = experts[0].weight + experts[1].weight
        # Weights that cancel name no point of the arc; its middle is as good as any.
        t = experts[1].weight / total if abs(total) >= 1e-6 else 0.5
        vectors = vectors_around(block, parameters.origin)
        if parameters.along == "tensor":
            merged = combine(nuslerp_coefficients(read_gram(block.measured, count=2), t=t), vectors)
        elif parameters.along == "rows" or block.base.ndim < 2:
            merged = combine(nuslerp_coefficients(gram(vectors), t=t), vectors)
        else:
            turned = [vector.transpose(0, -1) for vector in vectors]
            merged = combine(nuslerp_coefficients(gram(turned), t=t), turned).transpose(0, -1)
        return MergedBlock(add_origin(block, merged, parameters.origin).to(block.dtype))


def check_origin(method: str, origin: Origin, *, has_base: bool) -> None:
    """Raise RecipeError where the sphere's centre is a base that the recipe has not."""
    if origin == "base" and not has_base:
        raise RecipeError(
            f"base: is missing; {method!r} works on task vectors. Give the base LLM, or 'origin:"
            " zero' to work on the weights"
        )


def vectors_around(block: Block, origin: Origin) -> list[torch.Tensor]:
    """Return the experts' task vectors, or their weights."""
    return block.task_vectors() if origin == "base" else list(block.experts)


def add_origin(block: Block, merged: torch.Tensor, origin: Origin) -> torch.Tensor:
    """Return the weights that a merged vector around an origin stands for."""
    return block.base + merged if origin == "base" else merged
