"""Karcher: the mean of the experts on the sphere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Stage
from mmerge.workers.methods.sphere import (
    combine,
    gram_stage,
    karcher_coefficients,
    measure_products,
    read_gram,
)


class KarcherParameters(Parameters):
    """Parameters of the Karcher mean."""

    max_iter: int = Field(10, ge=0, description="most steps of the descent")
    tol: float = Field(
        1e-5, gt=0, description="a step shorter than this (radians) ends the descent"
    )


class Karcher(Method):
    """The point on the sphere whose squared arcs to all experts add up to least, times their mean
    norm, per tensor.
    """

    name = "karcher"
    kind = "plain"
    source = "Karcher, Riemannian center of mass, 1977; per flattened tensor as in mergekit"
    parameters_model = KarcherParameters
    needs_base = False

    @override
    def stages(
        self, parameters: KarcherParameters, experts: Sequence[Parameters]
    ) -> tuple[Stage, ...]:
        return (gram_stage(),)

    @override
    def measure_block(
        self,
        block: Block,
        parameters: KarcherParameters,
        experts: Sequence[Parameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        return measure_products(block.experts)

    @override
    def merge_block(
        self, block: Block, parameters: KarcherParameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        if len(block.experts) == 1:
            return MergedBlock(block.experts[0].to(block.dtype))
        products = read_gram(block.measured, count=len(block.experts))
        coefficients = karcher_coefficients(
            products, max_iterations=parameters.max_iter, tolerance=parameters.tol
        )
        return MergedBlock(combine(coefficients, block.experts).to(block.dtype))
