"""Task arithmetic: add the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters


class TaskArithmeticParameters(Parameters):
    """Numbers of task arithmetic."""

    scale: float = Field(1.0, description="coefficient λ on the summed task vectors")


class TaskArithmeticExpertParameters(Parameters):
    """Numbers of task arithmetic per expert."""

    weight: float = Field(1.0, description="weight of this expert's task vector")


class TaskArithmetic(Method):
    """θ = θ₀ + λ·Σ wᵢτᵢ."""

    name = "task_arithmetic"
    kind = "plain"
    source = "Editing Models with Task Arithmetic, arXiv 2212.04089"
    parameters_model = TaskArithmeticParameters
    expert_parameters_model = TaskArithmeticExpertParameters

    @override
    def merge_block(
        self, block: Block, parameters: TaskArithmeticParameters, experts: Sequence[TaskArithmeticExpertParameters]
    ) -> MergedBlock:
        total = torch.zeros_like(block.base)
        for delta, expert in zip(block.task_vectors(), experts, strict=True):
            total += expert.weight * delta
        return MergedBlock((block.base + parameters.scale * total).to(block.dtype))
