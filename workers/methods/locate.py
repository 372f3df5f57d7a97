"""Locate, then merge: Sub finds what of each task vector is kept, F puts the located task vectors
together.

θ = θ₀ + λ·F(Sub(τ₁), …, Sub(τₙ)): the frame of arXiv 2505.16703 (docs/arithmetic.md), in which
task arithmetic, TIES, Breadcrumbs, DARE and DELLA are instances. F is the weighted sum, or sign
election with a disjoint merge.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.election import (
    DisjointReduction,
    ZeroSign,
    disjoint_merge,
    elect_sign,
    sum_in_order,
)
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Scope, Stage


class ScaleParameters(Parameters):
    """The number of every method of this frame."""

    scale: float = Field(1.0, description="coefficient λ on the merged task vector")


class SumParameters(ScaleParameters):
    """Numbers of a merge by weighted sum."""

    normalize: bool = Field(False, description="divide the weighted sum by the sum of the weights")


class ElectParameters(ScaleParameters):
    """Numbers of a merge by sign election."""

    reduction: DisjointReduction = Field(
        "mean",
        description=(
            "disjoint merge by mean (over the weights that agree), sum, or largest magnitude"
        ),
    )
    zero_sign: ZeroSign = Field(
        "nothing",
        description=(
            "what an exact zero sum elects: nothing, +1, or the majority sign of the model (with"
            " scope: tensor, of the tensor)"
        ),
    )


class WeightParameters(Parameters):
    """Numbers per expert of a merge of task vectors."""

    weight: float = Field(1.0, description="weight of this expert's task vector")


def weigh(
    deltas: Sequence[torch.Tensor], experts: Sequence[WeightParameters]
) -> list[torch.Tensor]:
    """Return wᵢτᵢ."""
    return [
        delta if expert.weight == 1.0 else expert.weight * delta
        for delta, expert in zip(deltas, experts, strict=True)
    ]


class LocateThenSum(Method):
    """θ = θ₀ + λ·Σ wᵢ·Sub(τᵢ), divided by Σ wᵢ where asked for."""

    kind = "plain"
    expert_parameters_model = WeightParameters

    @abstractmethod
    def locate(self, block: Block, parameters: Any, experts: Sequence[Any]) -> list[torch.Tensor]:
        """Return Sub(τᵢ) per expert, float32, shape of the block."""

    @override
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        located = self.locate(block, parameters, experts)
        total = sum_in_order(weigh(located, experts))
        weights = sum(expert.weight for expert in experts)
        if parameters.normalize and weights:
            total /= weights
        return MergedBlock((block.base + parameters.scale * total).to(block.dtype), trimmed=located)


class LocateThenElect(Method):
    """θ = θ₀ + λ·τ⋆ with τ⋆ from the elected signs of wᵢ·Sub(τᵢ)."""

    kind = "plain"
    expert_parameters_model = WeightParameters

    @abstractmethod
    def locate(self, block: Block, parameters: Any, experts: Sequence[Any]) -> list[torch.Tensor]:
        """Return Sub(τᵢ) per expert, float32, shape of the block."""

    def majority_scope(self, parameters: Any) -> Scope:
        """Return over what the majority sign is taken."""
        return "model"

    def locate_stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        """Return the stages that `locate` needs."""
        return ()

    def measure_located(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        """Return the quantities of a stage of `locate_stages`."""
        raise NotImplementedError(f"{self.name} has no stage {stage!r}")

    @override
    def stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        elect = (
            (Stage("elect", "sums", self.majority_scope(parameters)),)
            if parameters.zero_sign == "majority"
            else ()
        )
        return (*self.locate_stages(parameters, experts), *elect)

    @override
    def measure_block(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        if stage != "elect":
            return self.measure_located(block, parameters, experts, stage=stage)
        return {"sign": elect_sign(weigh(self.locate(block, parameters, experts), experts))}

    @override
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        located = self.locate(block, parameters, experts)
        weighted = weigh(located, experts)
        sign = elect_sign(weighted, zero_sign=zero_sign_of(block, parameters.zero_sign))
        merged = disjoint_merge(
            weighted,
            sign,
            reduction=parameters.reduction,
            weights=[expert.weight for expert in experts],
        )
        return MergedBlock(
            (block.base + parameters.scale * merged).to(block.dtype), trimmed=located, sign=sign
        )


def zero_sign_of(block: Block, rule: ZeroSign) -> float:
    """Return the sign that an exact zero sum gets: by the stage `elect` where the rule is the
    majority.
    """
    if rule == "nothing":
        return 0.0
    if rule == "positive":
        return 1.0
    total = block.known["sign"][0]
    return float(total > 0) - float(total < 0)
