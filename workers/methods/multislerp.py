"""Multi-SLERP: a weighted mean of any number of experts on the sphere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, RecipeError
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Stage
from mmerge.workers.methods.nuslerp import Origin, add_origin, check_origin, vectors_around
from mmerge.workers.methods.sphere import (
    combine,
    gram_stage,
    measure_products,
    multislerp_coefficients,
    read_gram,
)


class MultislerpParameters(Parameters):
    """Parameters of Multi-SLERP."""

    origin: Origin = Field(
        "base",
        description="work on the task vectors ('base') or on the weights themselves ('zero')",
    )
    normalize: bool = Field(True, description="divide the weights by their sum")


class MultislerpExpertParameters(Parameters):
    """Parameters of Multi-SLERP per expert."""

    weight: float = Field(1.0, description="weight of this expert")


class Multislerp(Method):
    """Project onto the tangent space at the weighted mean direction, average there, and go back to
    the sphere.
    """

    name = "multislerp"
    kind = "plain"
    source = "mergekit, Multi-SLERP"
    parameters_model = MultislerpParameters
    expert_parameters_model = MultislerpExpertParameters
    needs_base = False

    @override
    def check_recipe(
        self,
        parameters: MultislerpParameters,
        experts: Sequence[MultislerpExpertParameters],
        *,
        has_base: bool,
    ) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        check_origin(self.name, parameters.origin, has_base=has_base)
        if parameters.normalize and sum(expert.weight for expert in experts) == 0:
            raise RecipeError(
                "experts: the weights add up to 0 and cannot be normalised. Change one, or say"
                " 'normalize: false'"
            )

    @override
    def stages(
        self, parameters: MultislerpParameters, experts: Sequence[MultislerpExpertParameters]
    ) -> tuple[Stage, ...]:
        return (gram_stage(from_base=parameters.origin == "base"),)

    @override
    def measure_block(
        self,
        block: Block,
        parameters: MultislerpParameters,
        experts: Sequence[MultislerpExpertParameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        return measure_products(vectors_around(block, parameters.origin))

    @override
    def merge_block(
        self,
        block: Block,
        parameters: MultislerpParameters,
        experts: Sequence[MultislerpExpertParameters],
    ) -> MergedBlock:
        vectors = vectors_around(block, parameters.origin)
        if len(vectors) == 1:
            return MergedBlock(block.experts[0].to(block.dtype))
        weights = [expert.weight for expert in experts]
        products = read_gram(block.measured, count=len(vectors))
        if not products.any():
            merged = torch.zeros_like(vectors[0])
        else:
            merged = combine(
                self._coefficients(block, products, weights, normalize=parameters.normalize),
                vectors,
            )
        return MergedBlock(add_origin(block, merged, parameters.origin).to(block.dtype))

    def _coefficients(
        self, block: Block, products: torch.Tensor, weights: list[float], *, normalize: bool
    ) -> torch.Tensor:
        coefficients = multislerp_coefficients(products, weights=weights, normalize=normalize)
        if coefficients is not None:
            return coefficients
        if len(weights) > 2:
            raise CheckpointError(
                f"{block.name}: the experts' weighted directions add up to zero, so 'multislerp'"
                " has no mean there. Change a weight"
            )
        total = sum(weights) if normalize else 1.0
        return torch.tensor([weight / total for weight in weights], dtype=torch.float64)
