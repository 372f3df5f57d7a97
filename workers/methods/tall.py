"""TALL masks, which find each task in a multi-task vector, and consensus merging, which keeps what
several tasks want.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.combine_rules import CombineRule, Election, WeightedSum
from mmerge.workers.methods.interface import (
    Block,
    MergedBlock,
    Parameters,
    Stage,
    TensorFacts,
    Trimming,
)
from mmerge.workers.methods.locate_rules import KeepAll, LocateRule, Trim
from mmerge.workers.methods.locate_then_mask import (
    LocateThenMask,
    Masking,
    Unweighted,
    make_masks,
)
from mmerge.workers.methods.locate_then_merge import (
    ELECT,
    LocateAndCombine,
    Locating,
    ZeroSign,
    find_zero_sign,
)
from mmerge.workers.methods.mask_rules import MaskRule, Nearer
from mmerge.workers.methods.ties import TrimParameters


class TallParameters(TrimParameters):
    """Parameters of TALL masks."""

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
    """Parameters of TALL masks per expert."""

    mask_scale: float | None = Field(
        None, gt=0, le=10, description="this expert's λ, instead of the recipe's"
    )


class MultiTaskLocating(Locating):
    """Everything for a sum, the largest magnitudes for TIES."""

    @override
    def trimming(
        self, parameters: TallParameters, experts: Sequence[TallExpertParameters]
    ) -> Trimming | None:
        if parameters.multi_task != "ties":
            return None
        return Trimming((parameters.density,) * len(experts), parameters.scope)

    @override
    def rules(
        self,
        tensor: TensorFacts,
        parameters: TallParameters,
        experts: Sequence[TallExpertParameters],
    ) -> Sequence[LocateRule]:
        if parameters.multi_task != "ties":
            return [KeepAll()] * len(experts)
        return [Trim(threshold) for threshold in tensor.thresholds]


class MultiTaskVector(Unweighted):
    """The sum of the task vectors, or TIES by disjoint sum."""

    @override
    def stages(self, parameters: TallParameters) -> tuple[Stage, ...]:
        if parameters.multi_task != "ties" or parameters.zero_sign != "majority":
            return ()
        return (Stage(ELECT, "sums", parameters.scope),)

    @override
    def rule(
        self,
        tensor: TensorFacts,
        parameters: TallParameters,
        experts: Sequence[TallExpertParameters],
    ) -> CombineRule:
        weights = self.weights(experts)
        if parameters.multi_task != "ties":
            return WeightedSum(weights)
        return Election(weights, "sum", find_zero_sign(tensor, parameters.zero_sign))


class TaskMasks(Masking):
    """The mask of each task: of its task vector before trimming, against the multi-task vector."""

    @override
    def rules(
        self, parameters: TallParameters, experts: Sequence[TallExpertParameters]
    ) -> Sequence[MaskRule]:
        return [
            Nearer(parameters.mask_scale if expert.mask_scale is None else expert.mask_scale)
            for expert in experts
        ]


class TallMasks(LocateThenMask):
    """τ_MT stored once and one mask per expert, mᵢ = 1{|τᵢ| > λᵢ·|τ_MT − τᵢ|}; expert i is θ₀ +
    mᵢ∘τ_MT.
    """

    name = "tall_masks"
    source = "TALL-masks, arXiv 2405.07813 (ICML 2024)"
    parameters_model = TallParameters
    expert_parameters_model = TallExpertParameters
    locating = MultiTaskLocating()
    combining = MultiTaskVector()
    masking = TaskMasks()


class ConsensusParameters(TallParameters):
    """Parameters of consensus merging."""

    agreement: int = Field(
        2,
        ge=0,
        description=(
            "k: an entry is kept where at least so many task masks want it (1 drops catastrophic, 2"
            " also selfish weights)"
        ),
    )
    scale: float = Field(1.0, description="coefficient α on the masked multi-task vector")


class Consensus(LocateAndCombine):
    """θ = θ₀ + α·m∘τ_MT, m the consensus mask: entries that at least k task masks want."""

    name = "consensus"
    kind = "plain"
    source = "Consensus merging, arXiv 2405.07813 (ICML 2024)"
    parameters_model = ConsensusParameters
    expert_parameters_model = TallExpertParameters
    compiled_pass = "mmerge.workers.compiled.locate_then_merge:make_consensus_pass"
    locating = MultiTaskLocating()
    combining = MultiTaskVector()
    masking = TaskMasks()

    @override
    def merge_block(
        self,
        block: Block,
        parameters: ConsensusParameters,
        experts: Sequence[TallExpertParameters],
    ) -> MergedBlock:
        combined = self.combine_block(block, parameters, experts)
        merged = combined.merged
        masks = make_masks(self.masking.rules(parameters, experts), block, combined, merged)
        votes = torch.stack(masks).sum(dim=0)
        kept = torch.where(votes >= parameters.agreement, merged, torch.zeros_like(merged))
        values = (block.base + parameters.scale * kept).to(block.dtype)
        return MergedBlock(values, trimmed=combined.located, sign=combined.sign)
