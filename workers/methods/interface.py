"""What a merge method is: its parameters, what it must know beforehand, and what it computes on one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Scope = Literal["model", "tensor"]
Reduction = Literal["sum", "mean"]


def _check_density(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"expected a number in (0, 1], got {value!r}")
    return value


Density = Annotated[float, BeforeValidator(_check_density), Field(gt=0, le=1)]
"""The share of a task vector that is kept."""


class Parameters(BaseModel):
    """Numbers and choices of a method; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


@dataclass(frozen=True)
class Trimming:
    """Which share of each expert's task vector is kept, and over what the threshold is taken."""

    densities: tuple[float, ...]
    scope: Scope


@dataclass(frozen=True)
class Block:
    """The same entries of base and experts, float32, flat, and the numbers that belong to them."""

    base: torch.Tensor
    experts: Sequence[torch.Tensor]
    thresholds: Sequence[float]
    """Per expert, the exact trim threshold; 0 keeps everything. Empty for methods that do not trim."""
    dtype: torch.dtype
    """The dtype in which the result is stored."""

    def task_vectors(self) -> list[torch.Tensor]:
        """Return τᵢ = θᵢ − θ₀ per expert, float32 (METHODS.md, Notation)."""
        return [expert - self.base for expert in self.experts]


@dataclass(frozen=True)
class MergedBlock:
    """What a method makes of a block: `values` in the storage dtype (τ⋆ of a masks build, θ of a plain one)."""

    values: torch.Tensor
    masks: Sequence[torch.Tensor] = ()
    """Per expert, boolean, same shape as `values`; only in builds of kind `masks`."""
    trimmed: Sequence[torch.Tensor] = ()
    """Per expert, the trimmed task vector, where the method trims: for statistics."""
    sign: torch.Tensor | None = None
    """The elected sign, where the method elects: for statistics."""


class Method(ABC):
    """One merge method. Instances hold no state; all numbers come as arguments."""

    name: ClassVar[str]
    kind: ClassVar[Literal["plain", "masks"]]
    source: ClassVar[str]
    """The publication or program that defines the arithmetic."""
    num_gpus: ClassVar[float] = 0
    """The share of a GPU that a worker of this method takes."""
    parameters_model: ClassVar[type[Parameters]] = Parameters
    """Keys that a recipe may have at its top level."""
    expert_parameters_model: ClassVar[type[Parameters]] = Parameters
    """Keys that each expert of a recipe may have."""

    def trimming(self, parameters: Any, experts: Sequence[Any]) -> Trimming | None:
        """Return what must be known of the task vectors' magnitudes before a block can be merged, None for nothing."""
        return None

    @abstractmethod
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        """Return the merge of one block. Pure: depends on nothing but its arguments, entry by entry."""
