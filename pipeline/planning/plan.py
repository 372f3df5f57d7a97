"""The plan of a build: all of its tasks, decided from headers alone.

A plan is pure data; the same recipe gives the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmerge.manifests.errors import CheckpointError, NotFound
from mmerge.manifests.format.manifest import AdapterRecord
from mmerge.manifests.format.safetensors_header import FLOAT_DTYPES
from mmerge.pipeline.planning.adapters import list_adapters
from mmerge.pipeline.planning.config_checks import list_config_warnings
from mmerge.pipeline.planning.input_checks import (
    check_expert_only_tensors,
    check_unmerged_tensors,
)
from mmerge.pipeline.planning.inputs import open_inputs
from mmerge.pipeline.planning.memory_bounds import (
    MIN_BLOCK_ENTRIES,
    MergeMemory,
    process_bytes,
    too_little_memory,
)
from mmerge.pipeline.planning.shards import (
    CopyShard,
    MergeShard,
    make_adapter_shards,
    make_base_shards,
    make_carry_shards,
    make_merge_shards,
)
from mmerge.pipeline.planning.tensor_layout import make_layout, match_names
from mmerge.pipeline.planning.tokenizer_checks import check_chat_source, list_tokenizer_warnings
from mmerge.pipeline.recipes.recipe import Recipe, pin_recipe
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.dtypes import NAMED_DTYPES
from mmerge.workers.checkpoints.formed_sources import (
    BlockScaledSource,
    GatheredSource,
    LowRankSource,
)
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Kind, MethodParameters

MAX_SHARD_BYTES = 2 << 30
"""Limit for the base tensors of one shard: larger layers are split, larger tensors by rows."""
DEFAULT_BLOCK_ENTRIES = 1 << 17
"""Entries of a tensor in memory at once; the result does not depend on it."""


Identities = dict[str, dict[str, str]]
"""By URI and weight file, a text that changes when the file is replaced."""


@dataclass(frozen=True)
class MergePlan:
    """All work of one build. `dtype` is the safetensors name of the output's dtype."""

    recipe: Recipe
    kind: Kind
    method_parameters: dict[str, MethodParameters]
    """Parameters of each merged tensor, by its name."""
    dtype: str
    merge_shards: tuple[MergeShard, ...]
    base_shards: tuple[CopyShard, ...]
    carry_shards: tuple[CopyShard, ...]
    renames: tuple[tuple[tuple[str, str], ...], ...]
    block_entries: int
    adapters: tuple[AdapterRecord, ...] = ()
    """Use of each expert's adapters; empty except in builds of kind `adapters`."""
    warnings: tuple[str, ...] = ()
    """Differences between base and experts that names and shapes do not show, one line each."""
    checkpoints: tuple[Checkpoint, ...] = field(default=(), compare=False, repr=False)
    """Base and experts, opened once; the run reads their identities and files."""
    identities: Identities = field(default_factory=dict, compare=False, repr=False)
    """Of the weight files, from before their headers were read."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    memory_bytes: int | None = field(default=None, compare=False, repr=False)
    """Memory limit of a process that runs one task."""

    @property
    def copy_shards(self) -> tuple[CopyShard, ...]:
        """Base and carry shards."""
        return (*self.base_shards, *self.carry_shards)

    @property
    def num_parameters(self) -> int:
        """P, the number of merged parameters."""
        return sum(tensor.num_entries for shard in self.merge_shards for tensor in shard.tensors)

    @property
    def bytes_in(self) -> int:
        """Bytes of distinct input: each is read once by the scan and once to merge or copy."""
        merged = sum(shard.bytes_in for shard in self.merge_shards)
        shared = {tensor.name for shard in self.merge_shards for tensor in shard.tensors}
        unmerged = sum(
            tensor.source.spec.num_bytes
            for shard in self.base_shards
            for tensor in shard.tensors
            if tensor.name not in shared
        )
        return merged + unmerged + sum(shard.num_bytes for shard in self.carry_shards)

    @property
    def bytes_out(self) -> int:
        """Bytes of the tensors that the build writes."""
        return sum(shard.bytes_out for shard in self.merge_shards) + sum(
            shard.num_bytes for shard in self.copy_shards
        )

    @property
    def peak_bytes(self) -> int:
        """Largest memory bound of a task, in bytes."""
        return max(
            [shard.peak_bytes for shard in self.merge_shards]
            + [shard.peak_bytes for shard in self.copy_shards],
            default=0,
        )


def make_plan(
    recipe: Recipe,
    *,
    block_entries: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    memory_bytes: int | None = None,
) -> MergePlan:
    """Return the plan of a recipe. Reads only configurations and safetensors headers.

    Args:
        recipe: what to build.
        block_entries: entries of a tensor in memory at once, a multiple of 65,536; 131,072 if
            absent, less where memory is short.
        max_shard_bytes: limit for the base tensors of one shard.
        memory_bytes: memory limit of a process that runs one task.

    Raises:
        CheckpointError, ShapeMismatch: the checkpoints cannot be read or do not fit together.
    """
    if block_entries is not None and (block_entries <= 0 or block_entries % (1 << 16)):
        raise ValueError(f"block_entries: expected a multiple of 65536, got {block_entries}")
    recipe = pin_recipe(recipe)
    inputs = open_inputs(recipe)
    base, experts = inputs.base, inputs.experts
    names = [expert.name for expert in recipe.experts]
    check_chat_source(recipe.chat_template_from, base, dict(zip(names, experts, strict=True)))
    try:
        identities = read_identities((base, *experts))
    except NotFound:
        identities = {}  # reading the headers finds the missing file, and names who needs it
    method = find_method(recipe.method)
    if method.kind == "adapters":
        return _make_adapters_plan(
            recipe,
            base,
            experts,
            identities=identities,
            block_entries=block_entries or DEFAULT_BLOCK_ENTRIES,
            max_shard_bytes=max_shard_bytes,
        )
    layout = make_layout(base, experts, merge=recipe.merge, carry=recipe.carry, keep=recipe.keep)
    experts = list(layout.experts)
    check_unmerged_tensors(
        base,
        experts,
        renames=layout.renames,
        exempt=match_names(base.tensors, (*recipe.carry, *recipe.keep)),
    )
    check_expert_only_tensors(base, experts, layout, kind=method.kind)
    dtype = NAMED_DTYPES[recipe.dtype] if recipe.dtype else _base_dtype(base)

    def make_shards(entries: int) -> tuple[MergeShard, ...]:
        memory = MergeMemory(
            method=method,
            block_entries=entries,
            keeps_non_finite=recipe.non_finite == "keep",
            has_stages=bool(
                method.stages(recipe.parameters, [expert.parameters for expert in recipe.experts])
            ),
        )
        shards = make_merge_shards(
            layout, recipe, dtype=dtype, memory=memory, max_bytes=max_shard_bytes
        )
        return tuple(shards)

    entries = block_entries or DEFAULT_BLOCK_ENTRIES
    merge_shards = make_shards(entries)
    while memory_bytes is not None:
        needed = process_bytes(shard.peak_bytes for shard in merge_shards)
        if needed <= memory_bytes:
            break
        if block_entries is not None or entries <= MIN_BLOCK_ENTRIES:
            raise too_little_memory(needed, memory_bytes)
        entries //= 2
        merge_shards = make_shards(entries)
    stored_base = tuple(base.tensors.values()) if method.kind == "masks" else layout.kept
    carry_shards: list[CopyShard] = []
    for expert, copied in zip(recipe.experts, layout.copied, strict=True):
        carry_shards += make_carry_shards(expert.name, copied, max_bytes=max_shard_bytes)
    return MergePlan(
        recipe=recipe,
        kind=method.kind,
        method_parameters=recipe.parameters_by_tensor([tensor.name for tensor in layout.shared]),
        dtype=dtype,
        merge_shards=merge_shards,
        base_shards=tuple(make_base_shards(stored_base, max_bytes=max_shard_bytes)),
        carry_shards=tuple(carry_shards),
        renames=layout.renames,
        block_entries=entries,
        warnings=(*inputs.warnings, *_list_warnings(base, experts)),
        checkpoints=(base, *experts),
        identities=identities,
        max_shard_bytes=max_shard_bytes,
        memory_bytes=memory_bytes,
    )


def read_identities(checkpoints: Sequence[Checkpoint]) -> Identities:
    """Return the identities of all weight files. Raises NotFound, CheckpointError."""
    parts = dict.fromkeys(part for checkpoint in checkpoints for part in checkpoint.parts)
    return {part.uri: part.identity for part in parts}


def check_plan(plan: MergePlan) -> None:
    """Check that a plan is still that of its recipe, whose files were replaced since.

    Everything that a plan takes from the files is read again: byte ranges, shapes, dtypes, scales,
    configurations, and which tensors are equal.

    Raises:
        CheckpointError: another plan would be made now, or none.
    """
    current = make_plan(
        plan.recipe, block_entries=plan.block_entries, max_shard_bytes=plan.max_shard_bytes
    )
    for planned, checkpoint in zip(plan.checkpoints, current.checkpoints, strict=True):
        names = sorted(planned.tensors.keys() | checkpoint.tensors.keys())
        changed = [
            name for name in names if planned.tensors.get(name) != checkpoint.tensors.get(name)
        ]
        what = changed[0] if changed else "its configuration"
        if changed or planned.config != checkpoint.config:
            raise CheckpointError(
                f"{planned.owner}: {planned.uri}: was replaced since the build was planned, and"
                f" {what} differs in place, shape or dtype. Run again"
            )
    if current != plan:
        raise CheckpointError(
            f"{plan.recipe.name}: its inputs were replaced since the build was planned, and another"
            " plan follows from them. Run again"
        )


def _make_adapters_plan(
    recipe: Recipe,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    identities: Identities,
    block_entries: int,
    max_shard_bytes: int,
) -> MergePlan:
    """Return the plan of a build of kind `adapters`, which copies and merges nothing.

    The base, each expert's adapters and its other tensors are copied.
    """
    expert_adapters = list_adapters(recipe, base, experts)
    carry_shards: list[CopyShard] = []
    for expert, adapters in zip(recipe.experts, expert_adapters, strict=True):
        carry_shards += make_adapter_shards(expert.name, adapters, max_bytes=max_shard_bytes)
    base_tensors = tuple(base.tensors.values())
    return MergePlan(
        recipe=recipe,
        kind="adapters",
        method_parameters={},
        dtype=NAMED_DTYPES[recipe.dtype] if recipe.dtype else _base_dtype(base),
        merge_shards=(),
        base_shards=tuple(make_base_shards(base_tensors, max_bytes=max_shard_bytes)),
        carry_shards=tuple(carry_shards),
        renames=tuple(() for _ in recipe.experts),
        block_entries=block_entries,
        adapters=tuple(adapters.record for adapters in expert_adapters),
        warnings=_list_warnings(base, experts),
        checkpoints=(base, *experts),
        identities=identities,
        max_shard_bytes=max_shard_bytes,
    )


def _list_warnings(base: Checkpoint, experts: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return what differs between base and experts though names and shapes agree."""
    warnings = []
    for expert in experts:
        warnings += list_config_warnings(base, expert)
    return (*warnings, *list_tokenizer_warnings(base, experts))


def _stored_weights(source: TensorSource) -> TensorSource:
    """Return a tensor whose dtype is that in which the files hold the weights of `source`."""
    if isinstance(source, BlockScaledSource):
        return source.weights
    if isinstance(source, LowRankSource):
        return _stored_weights(source.base)
    if isinstance(source, GatheredSource) and source.tables:
        return _stored_weights(source.tables[0])
    return source


def _base_dtype(base: Checkpoint) -> str:
    counted: dict[str, int] = {}
    for source in base.tensors.values():
        stored = _stored_weights(source)
        if stored.spec.dtype in FLOAT_DTYPES:
            counted[stored.spec.dtype] = counted.get(stored.spec.dtype, 0) + stored.spec.num_bytes
    if not counted:
        raise CheckpointError(f"base: {base.uri} has no floating-point tensors to merge")
    dtype = max(sorted(counted), key=lambda name: counted[name])
    if dtype.startswith("F8"):
        raise CheckpointError(
            f"base: its weights are {dtype}; say what to write with 'dtype: bfloat16' (or float16,"
            " float32)"
        )
    return dtype
