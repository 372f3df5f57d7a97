"""DAMC: experts tuned with decoupled LoRA adapters, composed without a merge; each token runs
through its own adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters


class DamcExpertParameters(Parameters):
    """Numbers and names of DAMC per expert."""

    coefficient: float | None = Field(
        None,
        description=(
            "parameter adjustment coefficient c of this expert's default adapter on text tokens;"
            " 1/n if absent"
        ),
    )
    adapter: str | None = Field(
        None,
        description=(
            "name of the adapter of this modality's tokens; the one that is not 'default', or is"
            " called as the modality"
        ),
    )
    default_adapter: str | None = Field(
        None, description="name of the adapter of text tokens; 'default', or the only one there is"
    )


class Damc(Method):
    """Modality tokens: W x + s·B_m A_m x. Text tokens: W x + Σ cᵢ·s·B_dᵢ A_dᵢ x. Nothing is merged:
    adapters stay beside the base.
    """

    name = "damc"
    kind = "adapters"
    source = "Model Composition for Multimodal LLMs (DAMC), arXiv 2402.12750 (ACL 2024)"
    expert_parameters_model = DamcExpertParameters

    @override
    def merge_block(
        self, block: Block, parameters: Parameters, experts: Sequence[DamcExpertParameters]
    ) -> MergedBlock:
        raise NotImplementedError("a build of adapters merges no tensor")
