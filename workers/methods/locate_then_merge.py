"""Locate, then merge: the frame of task arithmetic, TIES, DARE, DELLA, Breadcrumbs and MMER.

θ = θ₀ + λ·F(Sub(τ₁), …, Sub(τₙ)): Sub locates what of each task vector is kept, F combines the
located task vectors (arXiv 2505.16703). A method of this frame declares both:

    class DareTies(LocateThenMerge):
        locating = RandomDrop()
        combining = ByElection()

`Locating` and `Combining` turn parameters into the rules of one tensor (locate_rules,
combine_rules), which bring their definition in torch and their kernel. So a method made of existing
rules needs no arithmetic of its own, and runs compiled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.combine_rules import (
    CombineRule,
    DisjointReduction,
    Election,
    WeightedSum,
    elect_sign,
)
from mmerge.workers.methods.interface import (
    Block,
    Granularity,
    MergedBlock,
    Method,
    Parameters,
    Scope,
    Stage,
    TensorFacts,
    Trimming,
)
from mmerge.workers.methods.locate_rules import LocateRule

ZeroSign = Literal["nothing", "positive", "majority"]
COMPILED_PASS = "mmerge.workers.compiled.locate_then_merge:make_pass"
ELECT = "elect"
"""The stage in which the signs of a scope are summed, for the majority sign."""


class ScaleParameters(Parameters):
    """The parameter of every method of this frame."""

    scale: float = Field(1.0, description="coefficient λ on the merged task vector")


class SumParameters(ScaleParameters):
    """Parameters of a merge by weighted sum."""

    normalize: bool = Field(False, description="divide the weighted sum by the sum of the weights")


class ElectParameters(ScaleParameters):
    """Parameters of a merge by sign election."""

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
    """Parameters per expert of a merge of task vectors."""

    weight: float = Field(1.0, description="weight of this expert's task vector")


class Locating(ABC):
    """How a method finds what of each task vector is kept. Instances have no state."""

    def check(self, parameters: Any, experts: Sequence[Any]) -> None:
        """Raise RecipeError where the parameters do not fit each other."""
        return

    def granularity(self, parameters: Any, experts: Sequence[Any]) -> Granularity:
        """Return what the rules must see at once."""
        return "entry"

    def trimming(self, parameters: Any, experts: Sequence[Any]) -> Trimming | None:
        """Return which trim thresholds the rules need, None for none."""
        return None

    def stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        """Return the stages whose sums the rules need."""
        return ()

    def measure(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        """Return the quantities of one of `stages` on one block."""
        raise NotImplementedError(f"{type(self).__name__} has no stage {stage!r}")

    def revision(self, parameters: Any, experts: Sequence[Any]) -> int:
        """Return how often the results for these parameters have changed, see `Method.revision`."""
        return 0

    def working_bytes(self, num_entries: int, *, num_experts: int) -> int:
        """Return what `locate` allocates for a block, beyond what every method does."""
        return 0

    @abstractmethod
    def rules(
        self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]
    ) -> Sequence[LocateRule]:
        """Return the rule of each expert for one tensor."""


class Combining(ABC):
    """How a method combines located task vectors. Instances have no state."""

    def scale(self, parameters: Any) -> float:
        """Return the coefficient on the merged task vector."""
        return float(parameters.scale)

    def weights(self, experts: Sequence[Any]) -> tuple[float, ...]:
        """Return the weight of each expert."""
        return tuple(expert.weight for expert in experts)

    def stages(self, parameters: Any) -> tuple[Stage, ...]:
        """Return the stages whose sums the rule needs: none, or `ELECT`."""
        return ()

    @abstractmethod
    def rule(self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]) -> CombineRule:
        """Return the rule for one tensor."""


class BySum(Combining):
    """A weighted sum, for `SumParameters` and `WeightParameters`."""

    @override
    def rule(self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]) -> CombineRule:
        return WeightedSum(self.weights(experts), parameters.normalize)


class ByElection(Combining):
    """A sign election, for `ElectParameters` and `WeightParameters`."""

    def scope(self, parameters: Any) -> Scope:
        """Return over what the majority sign is taken."""
        return "model"

    @override
    def stages(self, parameters: Any) -> tuple[Stage, ...]:
        if parameters.zero_sign != "majority":
            return ()
        return (Stage(ELECT, "sums", self.scope(parameters)),)

    @override
    def rule(self, tensor: TensorFacts, parameters: Any, experts: Sequence[Any]) -> CombineRule:
        zero_sign = find_zero_sign(tensor, parameters.zero_sign)
        return Election(self.weights(experts), parameters.reduction, zero_sign)


def find_zero_sign(tensor: TensorFacts, rule: ZeroSign) -> float:
    """Return the sign that an exact zero sum elects; that of the stage `ELECT` for the majority."""
    if rule == "nothing":
        return 0.0
    if rule == "positive":
        return 1.0
    total = tensor.measured["sign"][0]
    return float(total > 0) - float(total < 0)


@dataclass(frozen=True)
class Combined:
    """One block, located and combined."""

    located: list[torch.Tensor]
    """Per expert, float32."""
    merged: torch.Tensor
    """The merged task vector, float32, not scaled."""
    sign: torch.Tensor | None
    """The elected sign, None where nothing is elected."""


class LocateAndCombine(Method):
    """Base of the methods that locate and combine; what they store is left to subclasses."""

    locating: ClassVar[Locating]
    combining: ClassVar[Combining]

    @override
    def check_recipe(self, parameters: Any, experts: Sequence[Any], *, has_base: bool) -> None:
        super().check_recipe(parameters, experts, has_base=has_base)
        self.locating.check(parameters, experts)

    @override
    def granularity(self, parameters: Any, experts: Sequence[Any]) -> Granularity:
        return self.locating.granularity(parameters, experts)

    @override
    def trimming(self, parameters: Any, experts: Sequence[Any]) -> Trimming | None:
        return self.locating.trimming(parameters, experts)

    @override
    def stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        return (*self.locating.stages(parameters, experts), *self.combining.stages(parameters))

    @override
    def measure_block(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        if stage != ELECT:
            return self.locating.measure(block, parameters, experts, stage=stage)
        located = self._locate(block, parameters, experts)
        weights = self.combining.weights(experts)
        return {"sign": elect_sign(WeightedSum(weights).weigh(located))}

    @override
    def revision(self, parameters: Any, experts: Sequence[Any]) -> int:
        return self.locating.revision(parameters, experts)

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        common = super().working_bytes(num_entries, num_experts=num_experts, shape=shape)
        return common + self.locating.working_bytes(num_entries, num_experts=num_experts)

    def combine_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> Combined:
        """Return one block, located and combined."""
        located = self._locate(block, parameters, experts)
        merged, sign = self.combining.rule(block.facts, parameters, experts).combine(located)
        return Combined(located, merged, sign)

    def _locate(self, block: Block, parameters: Any, experts: Sequence[Any]) -> list[torch.Tensor]:
        rules = self.locating.rules(block.facts, parameters, experts)
        deltas = block.task_vectors()
        return [
            rule.locate(delta, start=block.start) for rule, delta in zip(rules, deltas, strict=True)
        ]


class LocateThenMerge(LocateAndCombine):
    """θ = θ₀ + λ·F(Sub(τ₁), …, Sub(τₙ)), an ordinary checkpoint."""

    kind = "plain"
    compiled_pass = COMPILED_PASS
    expert_parameters_model = WeightParameters

    @override
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        combined = self.combine_block(block, parameters, experts)
        values = block.base + self.combining.scale(parameters) * combined.merged
        return MergedBlock(values.to(block.dtype), trimmed=combined.located, sign=combined.sign)
