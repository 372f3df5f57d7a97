"""Task arithmetic: add the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from mmerge.workers.methods.interface import Block
from mmerge.workers.methods.locate import LocateThenSum, SumParameters, WeightParameters


class TaskArithmetic(LocateThenSum):
    """θ = θ₀ + λ·Σ wᵢτᵢ."""

    name = "task_arithmetic"
    source = "Editing Models with Task Arithmetic, arXiv 2212.04089"
    parameters_model = SumParameters

    @override
    def locate(
        self, block: Block, parameters: SumParameters, experts: Sequence[WeightParameters]
    ) -> list[torch.Tensor]:
        return block.task_vectors()
