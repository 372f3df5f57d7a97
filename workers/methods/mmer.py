"""MMER: merge, then decouple. One merged task vector, and a mask per modality that keeps each
expert recoverable.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Density, Parameters, Reduction, Scope
from mmerge.workers.methods.locate_then_mask import ByUnweightedElection, LocateThenMask, Masking
from mmerge.workers.methods.mask_rules import MaskRule, Significant
from mmerge.workers.methods.ties import ThresholdTrim


class MmerParameters(Parameters):
    """Parameters of MMER. Sum and scope `model` are our choices where the paper is open
    (docs/arithmetic.md).
    """

    density: Density = Field(
        0.8, description="share of each task vector that is kept (published: 0.8)"
    )
    scope: Scope = Field(
        "model", description="take the trim threshold over the whole model or per tensor"
    )
    reduction: Reduction = Field("sum", description="disjoint merge by sum (our choice) or mean")
    mask_scale: float = Field(
        0.75,
        gt=0,
        le=10,
        description="λ of every expert that gives none (our choice: 0.75; usable 0.6 to 0.9)",
    )


class MmerExpertParameters(Parameters):
    """Parameters of MMER per expert."""

    mask_scale: float | None = Field(
        None, gt=0, le=10, description="this expert's λ, instead of the recipe's"
    )
    density: Density | None = Field(
        None, description="this expert's density, instead of the recipe's"
    )


class ModalityMasks(Masking):
    """Entries of dominant significance and directional congruence."""

    @override
    def rules(
        self, parameters: MmerParameters, experts: Sequence[MmerExpertParameters]
    ) -> Sequence[MaskRule]:
        return [
            Significant(parameters.mask_scale if expert.mask_scale is None else expert.mask_scale)
            for expert in experts
        ]


class Mmer(LocateThenMask):
    """τ⋆ from trim, elect and disjoint merge, a mask per expert; the base stays beside them."""

    name = "mmer"
    source = "MMER, arXiv 2505.17110 (ACL 2025)"
    parameters_model = MmerParameters
    expert_parameters_model = MmerExpertParameters
    locating = ThresholdTrim()
    combining = ByUnweightedElection()
    masking = ModalityMasks()
