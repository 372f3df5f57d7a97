"""Linear merge: the weighted average of the experts' weights (model soups)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters


class LinearParameters(Parameters):
    """Parameters of the linear merge."""

    normalize: bool = Field(True, description="divide by the sum of the weights")


class LinearExpertParameters(Parameters):
    """Parameters of the linear merge per expert."""

    weight: float = Field(1.0, description="weight of this expert")


class Linear(Method):
    """θ = Σ wᵢθᵢ / Σ wᵢ, or un-normalised."""

    name = "linear"
    kind = "plain"
    needs_base = False
    source = "Model soups, arXiv 2203.05482"
    parameters_model = LinearParameters
    compiled_pass = "mmerge.workers.compiled.linear:make_linear_pass"
    expert_parameters_model = LinearExpertParameters

    @override
    def check_recipe(
        self,
        parameters: LinearParameters,
        experts: Sequence[LinearExpertParameters],
        *,
        has_base: bool,
    ) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        if parameters.normalize and not sum(expert.weight for expert in experts):
            raise RecipeError(
                "experts: the weights sum to 0, by which 'normalize' would divide. Change a weight,"
                " or set 'normalize: false'"
            )

    @override
    def merge_block(
        self, block: Block, parameters: LinearParameters, experts: Sequence[LinearExpertParameters]
    ) -> MergedBlock:
        total = torch.zeros_like(block.base)
        for values, expert in zip(block.experts, experts, strict=True):
            total += expert.weight * values
        if parameters.normalize:
            total /= sum(expert.weight for expert in experts)
        return MergedBlock(total.to(block.dtype))
