"""Model Stock: as far from the base towards the experts' mean as the angle between the experts
allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import (
    Block,
    Granularity,
    MergedBlock,
    Method,
    Parameters,
    Stage,
)
from mmerge.workers.methods.sphere import (
    gram,
    gram_stage,
    measure_products,
    model_stock_ratio,
    read_gram,
)


class ModelStockParameters(Parameters):
    """Parameters of Model Stock."""

    filter_wise: bool = Field(False, description="one angle per row instead of one per tensor")


class ModelStock(Method):
    """θ = t·mean θᵢ + (1 − t)·θ₀ with t = n·cosθ / (1 + (n − 1)·cosθ)."""

    name = "model_stock"
    kind = "plain"
    source = (
        "Model Stock, arXiv 2403.19522; the mean of the pairwise cosines for more than two experts"
        " as in mergekit"
    )
    parameters_model = ModelStockParameters
    min_experts = 2

    @override
    def granularity(
        self, parameters: ModelStockParameters, experts: Sequence[Parameters]
    ) -> Granularity:
        return "row" if parameters.filter_wise else "entry"

    @override
    def stages(
        self, parameters: ModelStockParameters, experts: Sequence[Parameters]
    ) -> tuple[Stage, ...]:
        return () if parameters.filter_wise else (gram_stage(from_base=True),)

    @override
    def measure_block(
        self,
        block: Block,
        parameters: ModelStockParameters,
        experts: Sequence[Parameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        return measure_products(block.task_vectors())

    @override
    def merge_block(
        self, block: Block, parameters: ModelStockParameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        products = (
            gram(block.task_vectors())
            if parameters.filter_wise
            else read_gram(block.measured, count=len(block.experts))
        )
        t = model_stock_ratio(products).to(torch.float32).unsqueeze(-1)
        mean = torch.zeros_like(block.base)
        for expert in block.experts:
            mean += expert
        mean /= len(block.experts)
        return MergedBlock((t * mean + (1 - t) * block.base).to(block.dtype))
