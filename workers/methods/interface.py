"""What a merge method is: its parameters, what it must know beforehand, and what it computes on one
block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mmerge.manifests.errors import RecipeError
from mmerge.workers.runtime.method_source import digest_source

if TYPE_CHECKING:
    import torch

MAX_COMPILED_EXPERTS = 16
"""With more experts the torch definition of a method is used.

Kernels are compiled once per number of experts, in 1 s for 3 and 7 s for 16.
"""
Scope = Literal["model", "tensor"]
Reduction = Literal["sum", "mean"]
Kind = Literal["plain", "masks", "adapters"]
Granularity = Literal["entry", "row", "tensor"]
"""What a method must see at once: any entries, whole rows, or the whole tensor."""
Measured = Mapping[str, tuple[float, ...]]
"""What the stages of a method found, by quantity: one number per sum, one per rank that was asked
for.
"""


def _check_density(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"expected a number in (0, 1], got {value!r}")
    return value


Density = Annotated[float, Field(gt=0, le=1), BeforeValidator(_check_density)]
"""The share of a task vector that is kept."""


class Parameters(BaseModel):
    """Parameters of a method; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, allow_inf_nan=False, defer_build=True
    )


@dataclass(frozen=True)
class Trimming:
    """Which share of each expert's task vector is kept, and over what the threshold is taken."""

    densities: tuple[float, ...]
    scope: Scope
    rounding: Literal["kept", "dropped"] = "kept"
    """Which count is rounded down when a share of N is no whole number: the kept or the dropped
    entries.
    """


@dataclass(frozen=True)
class ProductVectors:
    """Inputs whose entrywise products a stage sums: of every pair of vectors, each with itself too,
    as quantities "0.0", "0.1", …, "1.1", …
    """

    first: int
    """The first input that is a vector: 0 for the base, 1 for the first expert."""
    from_base: bool
    """Whether the vectors are task vectors."""


@dataclass(frozen=True)
class Stage:
    """One look at the inputs before shards can be merged: quantities measured on every block and
    reduced to numbers.

    `sums` adds the measured values exactly, so the result depends on no order; `ranks` finds order
    statistics exactly. Either is taken over the whole model or per tensor. `vectors` adds vectors
    of one length per tensor (a number per row or column, say) and gives those of all tensors to
    `resolve_vectors`; its blocks are whole rows of a fixed size. A stage sees the thresholds and
    the numbers of the stages before it.
    """

    name: str
    measures: Literal["sums", "ranks", "vectors"]
    scope: Scope = "tensor"
    products: ProductVectors | None = None
    """Set where the quantities are products of inputs: a compiled pass then sums them."""


@dataclass(frozen=True)
class MethodParameters:
    """The parameters that hold for one tensor, as plain data: of the recipe, and of each expert."""

    parameters: dict[str, Any]
    experts: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class TensorMeasurements:
    """What the stages found for one whole tensor."""

    name: str
    num_entries: int
    measured: Measured


@dataclass(frozen=True)
class TensorFacts:
    """What is known of one whole tensor before its blocks are merged."""

    name: str
    """Its name in the base."""
    shape: tuple[int, ...]
    thresholds: Sequence[float]
    """Per expert, the exact trim threshold; empty for methods that do not trim."""
    expert_names: tuple[str, ...]
    measured: Measured
    """What the method's stages found."""

    @property
    def num_entries(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorVectors:
    """What a stage of `vectors` found for one whole tensor."""

    name: str
    shape: tuple[int, ...]
    vectors: Mapping[str, torch.Tensor]
    """By quantity, float64, one dimension."""
    parameters: Any
    """The method's parameters that hold for this tensor."""


@dataclass(frozen=True)
class Block:
    """The same entries of base and experts, float32, and the numbers that belong to them.

    With granularity `entry` every tensor is flat; with `row` it is [rows, columns] (a tensor of one
    dimension is one row); with `tensor` it has the tensor's own shape.
    """

    base: torch.Tensor
    experts: Sequence[torch.Tensor]
    thresholds: Sequence[float]
    """Per expert, the exact trim threshold; 0 keeps everything. Empty for methods that do not trim.
    """
    dtype: torch.dtype
    """The dtype in which the result is stored."""
    name: str = ""
    """The tensor's name in the base."""
    start: int = 0
    """Position of the first entry within the whole tensor, counted in C order."""
    shape: tuple[int, ...] = ()
    """Shape of the whole tensor in the base."""
    expert_names: tuple[str, ...] = ()
    measured: Measured = field(default_factory=dict)
    """What the method's stages found for this tensor."""

    @property
    def facts(self) -> TensorFacts:
        """What is known of the whole tensor."""
        return TensorFacts(self.name, self.shape, self.thresholds, self.expert_names, self.measured)

    def to_device(self, device: str) -> Block:
        """Return the block on a device."""
        return replace(
            self, base=self.base.to(device), experts=[expert.to(device) for expert in self.experts]
        )

    def task_vectors(self) -> list[torch.Tensor]:
        """Return τᵢ = θᵢ − θ₀ per expert, float32 (docs/arithmetic.md, Notation)."""
        return [expert - self.base for expert in self.experts]


@dataclass(frozen=True)
class MergedBlock:
    """What a method makes of a block: `values` in the storage dtype (τ⋆ of a masks build, θ of a
    plain one).
    """

    values: torch.Tensor
    """As many entries as the block, in the same order; the shape is free."""
    masks: Sequence[torch.Tensor] = ()
    """Per expert, boolean, same shape as `values`; only in builds of kind `masks`."""
    trimmed: Sequence[torch.Tensor] = ()
    """Per expert, the trimmed task vector, where the method trims: for statistics."""
    sign: torch.Tensor | None = None
    """The elected sign, where the method elects: for statistics."""


class Method(ABC):
    """One merge method. Instances hold no state; all numbers come as arguments.

    Adding a method is one file: its parameters, its arithmetic, and a docstring with the source.
    `parameters` and `experts` are instances of the two parameter models, valid for the tensor at
    hand: a recipe may give numbers per tensor. A later correction of the arithmetic goes with a
    higher `revision`, so that stored objects with the old bytes are not reused.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    source: ClassVar[str]
    """The publication or program that defines the arithmetic."""
    parameters_model: ClassVar[type[Parameters]] = Parameters
    """Keys that a recipe may have at its top level."""
    expert_parameters_model: ClassVar[type[Parameters]] = Parameters
    """Keys that each expert of a recipe may have."""
    min_experts: ClassVar[int] = 1
    max_experts: ClassVar[int | None] = None
    needs_base: ClassVar[bool] = True
    """Whether the arithmetic uses θ₀; without it a recipe may leave `base` out, and the first
    expert names the tensors.
    """
    task_unit: ClassVar[Literal["layer", "tensor"]] = "layer"
    """What one task merges; `tensor` for methods whose work on one matrix is long."""
    compiled_pass: ClassVar[str] = ""
    """`module:attribute` of a function that makes the compiled pass of one tensor, see
    workers/compiled/interface.py; empty for a method that runs in torch. A class that overrides
    `merge_block` does not inherit it: the pass computes what the overridden method did.
    """

    uses_math_library: ClassVar[bool] = False
    """Whether the bits of whole tensors depend on the linear-algebra library: singular values,
    eigenvalues, products of matrices. It is then part of their identity.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "merge_block" in vars(cls) and "compiled_pass" not in vars(cls):
            cls.compiled_pass = ""

    def check_recipe(self, parameters: Any, experts: Sequence[Any], *, has_base: bool) -> None:
        """Raise RecipeError where the recipe as a whole does not fit the method."""
        if self.needs_base and not has_base:
            raise RecipeError(
                f"base: is missing; {self.name!r} works on task vectors, which need the base LLM"
            )
        if len(experts) < self.min_experts or (
            self.max_experts is not None and len(experts) > self.max_experts
        ):
            allowed = (
                f"{self.min_experts}"
                if self.max_experts == self.min_experts
                else f"at least {self.min_experts}"
            )
            if self.max_experts is not None and self.max_experts != self.min_experts:
                allowed = f"{self.min_experts} to {self.max_experts}"
            raise RecipeError(
                f"experts: {self.name!r} takes {allowed}, the recipe has {len(experts)}. Take some"
                " out, or choose another method"
            )

    def granularity(self, parameters: Any, experts: Sequence[Any]) -> Granularity:
        """Return what `merge_block` and `measure_block` must see at once. Depends on choices alone,
        never on numbers.

        A build with masks takes `entry` or `tensor`: masks are packed to whole words block by
        block.
        """
        return "entry"

    def granularity_of(
        self, name: str, shape: Sequence[int], parameters: Any, experts: Sequence[Any]
    ) -> Granularity:
        """Return the granularity of one tensor, where it differs between tensors."""
        return self.granularity(parameters, experts)

    def trimming(self, parameters: Any, experts: Sequence[Any]) -> Trimming | None:
        """Return what must be known of the task vectors' magnitudes before a block can be merged,
        None for nothing.
        """
        return None

    def stages(self, parameters: Any, experts: Sequence[Any]) -> tuple[Stage, ...]:
        """Return the further looks at the inputs that are needed, in order. Depends on choices
        alone, never on numbers.
        """
        return ()

    def measure_block(
        self, block: Block, parameters: Any, experts: Sequence[Any], *, stage: str
    ) -> Mapping[str, torch.Tensor]:
        """Return the quantities of a stage on one block: float32, any shape, to be added up or
        ranked; or vectors, float64.
        """
        raise NotImplementedError(f"{self.name} has no stage {stage!r}")

    def ranks(
        self,
        parameters: Any,
        experts: Sequence[Any],
        *,
        stage: str,
        quantity: str,
        num_entries: int,
    ) -> tuple[int, ...]:
        """Return the ascending ranks (1-based) of a quantity that a stage of `ranks` must find
        among `num_entries` values.
        """
        raise NotImplementedError(f"{self.name} has no stage {stage!r}")

    def resolve_vectors(
        self,
        tensors: Sequence[TensorVectors],
        parameters: Any,
        experts: Sequence[Any],
        *,
        stage: str,
        config: Mapping[str, Any],
    ) -> Mapping[str, Measured]:
        """Return by tensor what follows from the vectors of all tensors. `config` is the base's, of
        its language model.
        """
        raise NotImplementedError(f"{self.name} has no stage {stage!r}")

    def revision(self, parameters: Any, experts: Sequence[Any]) -> int:
        """Return how often the results for these parameters have changed since the first release.

        Raise it when a correction changes bytes: stored objects and stage results of the affected
        recipes are then not reused. It is part of their identity unless it is 0.
        """
        return 0

    def revision_in(self, parameters: Any, experts: Sequence[Any], *, dtype: str) -> int:
        """Return `revision` for merged objects of a dtype; for results of stages if it is empty."""
        return self.revision(parameters, experts)

    def device(self, parameters: Any) -> str:
        """Return where whole matrices are merged, `cpu` or `cuda`."""
        return "cpu"

    def rescalers(
        self, tensors: Sequence[TensorMeasurements], *, num_experts: int
    ) -> tuple[float, ...] | None:
        """Return per expert the factor on its masked τ⋆ in a masks build (EMR), None where there is
        none.
        """
        return None

    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        """Return a bound on the bytes that `merge_block` allocates for a block of so many entries,
        beside its inputs.

        Per expert a task vector, a trimmed one, one of each again for statistics and a mask; sign,
        sum, count, election and histogram buffers once.
        """
        return num_entries * (num_experts * 18 + 64)

    @abstractmethod
    def merge_block(self, block: Block, parameters: Any, experts: Sequence[Any]) -> MergedBlock:
        """Return the merge of one block. Pure: depends on nothing but its arguments, entry by entry
        (row by row, …).
        """


def parse_parameters(method: Method, raw: MethodParameters) -> tuple[Any, list[Any]]:
    """Return the parameters of the recipe and of each expert that hold for one tensor, as the
    method's models.
    """
    experts = [method.expert_parameters_model.model_validate(values) for values in raw.experts]
    return method.parameters_model.model_validate(raw.parameters), experts


def identify_parameters(method: Method, raw: MethodParameters, *, dtype: str = "") -> list[Any]:
    """Return what of a tensor's parameters its results follow from, as plain JSON data."""
    identity: list[Any] = [raw.parameters, list(raw.experts)]
    revision = method.revision_in(*parse_parameters(method, raw), dtype=dtype)
    if revision:
        identity.append(revision)
    source = digest_source(type(method))
    if source is not None:
        identity.append({"source": source})
    return identity


def num_columns(shape: Sequence[int]) -> int:
    """Return the entries of one row: a tensor of less than two dimensions is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def entries_at_once(shape: Sequence[int], block_entries: int, *, granularity: Granularity) -> int:
    """Return how many entries of a tensor of this shape are in one block."""
    if granularity == "entry":
        return block_entries
    if granularity == "row":
        columns = max(num_columns(shape), 1)
        return max(block_entries // columns, 1) * columns
    return max(math.prod(shape), 1)
