"""NearSwap: entries in which base and expert nearly agree are taken from the expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters


def nearswap(base: torch.Tensor, expert: torch.Tensor, *, t: float) -> torch.Tensor:
    """Return base + w·τ with w = min(1, t/|τ|), float32; entries that are equal stay. mergekit's
    NearSwap.
    """
    weight = (t / (base - expert).abs()).clamp(max=1.0)
    return weight * expert + (1 - weight) * base


class NearswapParameters(Parameters):
    """Parameters of NearSwap."""

    t: float = Field(
        gt=0,
        description=(
            "differences up to this size are taken whole, larger ones in the proportion t/|τ|"
        ),
    )


class Nearswap(Method):
    """θ = θ₀ + min(1, t/|τ|)·τ, entry by entry."""

    name = "nearswap"
    kind = "plain"
    source = "alchemonaut, QuartetAnemoi-70B; as in mergekit"
    parameters_model = NearswapParameters
    max_experts = 1

    @override
    def merge_block(
        self, block: Block, parameters: NearswapParameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        return MergedBlock(nearswap(block.base, block.experts[0], t=parameters.t).to(block.dtype))
