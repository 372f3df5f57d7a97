"""Task arithmetic: add the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from mmerge.workers.methods.interface import TensorFacts
from mmerge.workers.methods.locate_rules import KeepAll, LocateRule
from mmerge.workers.methods.locate_then_merge import (
    BySum,
    LocateThenMerge,
    Locating,
    SumParameters,
)


class Everything(Locating):
    """All entries are kept."""

    @override
    def rules(
        self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]
    ) -> Sequence[LocateRule]:
        return [KeepAll()] * len(experts)


class TaskArithmetic(LocateThenMerge):
    """θ = θ₀ + λ·Σ wᵢτᵢ."""

    name = "task_arithmetic"
    source = "Editing Models with Task Arithmetic, arXiv 2212.04089"
    parameters_model = SumParameters
    locating = Everything()
    combining = BySum()
