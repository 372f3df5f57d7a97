"""SLERP: spherical interpolation between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import RecipeError
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Stage
from mmerge.workers.methods.sphere import combine, gram_stage, measure_products, slerp_pair


class SlerpParameters(Parameters):
    """Parameters of SLERP."""

    t: float = Field(
        ge=0, le=1, description="how far to go from the first model (0) to the second (1)"
    )


class Slerp(Method):
    """Interpolate along the arc, per tensor, between two experts or from the base to one expert."""

    name = "slerp"
    kind = "plain"
    source = (
        "Shoemake, Animating rotation with quaternion curves, 1985; per flattened tensor as in"
        " mergekit"
    )
    parameters_model = SlerpParameters
    compiled_pass = "mmerge.workers.compiled.linear:make_slerp_pass"
    max_experts = 2
    needs_base = False

    @override
    def check_recipe(
        self, parameters: SlerpParameters, experts: Sequence[Parameters], *, has_base: bool
    ) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        if len(experts) == 1 and not has_base:
            raise RecipeError(
                "experts: 'slerp' takes two models: two experts, or a base and one expert. Add one"
                " of them"
            )

    @override
    def stages(
        self, parameters: SlerpParameters, experts: Sequence[Parameters]
    ) -> tuple[Stage, ...]:
        first = first_vector(len(experts))
        return (gram_stage(first=first),)

    @override
    def measure_block(
        self,
        block: Block,
        parameters: SlerpParameters,
        experts: Sequence[Parameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        return measure_products(_models(block))

    @override
    def merge_block(
        self, block: Block, parameters: SlerpParameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        coefficients = torch.tensor(
            slerp_pair(block.measured, t=parameters.t),
            dtype=torch.float64,
            device=block.base.device,
        )
        return MergedBlock(combine(coefficients, _models(block)).to(block.dtype))


def first_vector(num_experts: int) -> int:
    """Return which input is the first model: an expert of two, or the base (0) for a single one."""
    return 1 if num_experts == 2 else 0


def _models(block: Block) -> list[torch.Tensor]:
    return list(block.experts) if len(block.experts) == 2 else [block.base, *block.experts]
