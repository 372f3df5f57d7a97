"""TALL masks, which find each task in a multi-task vector, and consensus merging, which keeps what
several tasks want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.election import ZeroSign, disjoint_merge, elect_sign, sum_in_order
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters, Stage, Trimming
from mmerge.workers.methods.locate import zero_sign_of
from mmerge.workers.methods.ties import TrimParameters, trim


class TallParameters(TrimParameters):
    """Numbers of TALL masks."""

    multi_task: Literal["task_arithmetic", "ties"] = Field(
        "task_arithmetic",
        description=(
            "the multi-task vector is the sum of the task vectors, or TIES by disjoint sum (with"
            " density and scope)"
        ),
    )
    zero_sign: ZeroSign = Field(
        "nothing",
        description=(
            "what an exact zero sum elects in TIES: nothing, +1, or the majority sign of the scope"
        ),
    )
    mask_scale: float = Field(
        0.4,
        gt=0,
        le=10,
        description=(
            "λ of every expert that gives none (our choice: 0.4, the middle of the published 0.2 to"
            " 0.6)"
        ),
    )


class TallExpertParameters(Parameters):
    """Numbers of TALL masks per expert."""

    mask_scale: float | None = Field(
        None, gt=0, le=10, description="this expert's λ, instead of the recipe's"
    )


def task_mask(delta: torch.Tensor, merged: torch.Tensor, *, mask_scale: float) -> torch.Tensor:
    """Return 1{|τᵢ| > λᵢ·|τ_MT − τᵢ|}, boolean, strictly. TALL-masks (arXiv 2405.07813), equation
    4.
    """
    return delta.abs() > mask_scale * (merged - delta).abs()


class _MultiTask(Method):
    """What TALL masks and consensus merging share: the multi-task vector and a mask per task."""

    expert_parameters_model = TallExpertParameters

    @override
    def trimming(self, parameters: TallParameters, experts: Sequence[Any]) -> Trimming | None:
        if parameters.multi_task != "ties":
            return None
        return Trimming((parameters.density,) * len(experts), parameters.scope)

    @override
    def stages(self, parameters: TallParameters, experts: Sequence[Any]) -> tuple[Stage, ...]:
        needs_majority = parameters.multi_task == "ties" and parameters.zero_sign == "majority"
        return (Stage("elect", "sums", parameters.scope),) if needs_majority else ()

    @override
    def measure_block(
        self, block: Block, parameters: TallParameters, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        return {"sign": elect_sign(_trim(block))}

    def multi_task_vector(
        self, block: Block, parameters: TallParameters
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        """Return τ_MT, the task vectors that went into it (trimmed for TIES), and the elected sign
        (None for a sum).
        """
        if parameters.multi_task == "task_arithmetic":
            deltas = block.task_vectors()
            return sum_in_order(deltas), deltas, None
        trimmed = _trim(block)
        sign = elect_sign(trimmed, zero_sign=zero_sign_of(block, parameters.zero_sign))
        return disjoint_merge(trimmed, sign, reduction="sum"), trimmed, sign

    def task_masks(
        self,
        block: Block,
        merged: torch.Tensor,
        parameters: TallParameters,
        experts: Sequence[TallExpertParameters],
    ) -> list[torch.Tensor]:
        """Return the mask of each task, of its untrimmed task vector against τ_MT."""
        scales = [
            parameters.mask_scale if expert.mask_scale is None else expert.mask_scale
            for expert in experts
        ]
        return [
            task_mask(delta, merged, mask_scale=scale)
            for delta, scale in zip(block.task_vectors(), scales, strict=True)
        ]


def _trim(block: Block) -> list[torch.Tensor]:
    return [
        trim(delta, threshold=threshold)
        for delta, threshold in zip(block.task_vectors(), block.thresholds, strict=True)
    ]


class TallMasks(_MultiTask):
    """τ_MT stored once and one mask per expert, mᵢ = 1{|τᵢ| > λᵢ·|τ_MT − τᵢ|}; expert i is θ₀ +
    mᵢ∘τ_MT.
    """

    name = "tall_masks"
    kind = "masks"
    source = "TALL-masks, arXiv 2405.07813 (ICML 2024)"
    parameters_model = TallParameters

    @override
    def merge_block(
        self, block: Block, parameters: TallParameters, experts: Sequence[TallExpertParameters]
    ) -> MergedBlock:
        merged, trimmed, sign = self.multi_task_vector(block, parameters)
        stored = merged.to(block.dtype)
        masks = self.task_masks(block, stored.to(torch.float32), parameters, experts)
        return MergedBlock(stored, masks, trimmed, merged.sign() if sign is None else sign)


class ConsensusParameters(TallParameters):
    """Numbers of consensus merging."""

    agreement: int = Field(
        2,
        ge=0,
        description=(
            "k: an entry is kept where at least so many task masks want it (1 drops catastrophic, 2"
            " also selfish weights)"
        ),
    )
    scale: float = Field(1.0, description="coefficient α on the masked multi-task vector")


class Consensus(_MultiTask):
    """θ = θ₀ + α·m∘τ_MT, m the consensus mask: entries that at least k task masks want."""

    name = "consensus"
    kind = "plain"
    source = "Consensus merging, arXiv 2405.07813 (ICML 2024)"
    parameters_model = ConsensusParameters

    @override
    def merge_block(
        self, block: Block, parameters: ConsensusParameters, experts: Sequence[TallExpertParameters]
    ) -> MergedBlock:
        merged, trimmed, sign = self.multi_task_vector(block, parameters)
        wanted = torch.stack(self.task_masks(block, merged, parameters, experts)).sum(dim=0)
        kept = torch.where(wanted >= parameters.agreement, merged, torch.zeros_like(merged))
        return MergedBlock(
            (block.base + parameters.scale * kept).to(block.dtype), trimmed=trimmed, sign=sign
        )
