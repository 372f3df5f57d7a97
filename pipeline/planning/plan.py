"""The plan: every task of a build decided from headers alone. Pure data; the same recipe gives the
same plan.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.entry import Role
from mmerge.manifests.format.manifest import AdapterRecord
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, FLOAT_DTYPES
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.pipeline.planning.adapters import list_adapters
from mmerge.pipeline.planning.input_checks import (
    check_expert_only_tensors,
    check_unmerged_tensors,
)
from mmerge.pipeline.planning.memory_bounds import (
    COPY_PEAK_BYTES,
    MIN_BLOCK_ENTRIES,
    Working,
    merge_peak_bytes,
    process_bytes,
    too_little_memory,
)
from mmerge.pipeline.planning.tensor_layout import (
    CopiedTensor,
    Layout,
    SharedTensor,
    make_layout,
    match_names,
)
from mmerge.pipeline.recipes.recipe import Recipe, pin_recipe
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.dtypes import NAMED_DTYPES
from mmerge.workers.checkpoints.lora_adapter import open_expert
from mmerge.workers.checkpoints.sources import BlockScaledSource, TensorSource, total_prefetch_bytes
from mmerge.workers.families.registry import is_before_layers
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Granularity, Kind, MethodParameters
from mmerge.workers.reconstruction.bitmask import packed_bytes
from mmerge.workers.task import CopyTensor, TensorTask

MAX_SHARD_BYTES = 2 << 30
"""A layer whose tensors of the base take more than this is split, and a tensor that takes more is
split by rows.
"""
DEFAULT_BLOCK_ENTRIES = 1 << 17
"""Entries of a tensor that are in memory at once; the result does not depend on it."""
MAX_PIECE_BYTES = 256 << 20
"""A tensor of the base that takes more than this is merged in pieces of rows: the masks of a piece
wait in memory.
"""


@dataclass(frozen=True)
class MergeShard:
    """The merged tensors of one layer, or a part of them."""

    name: str
    tensors: tuple[TensorTask, ...]
    bytes_in: int
    bytes_out: int
    peak_bytes: int


@dataclass(frozen=True)
class CopyShard:
    """Tensors that are copied as they are: of the base, or carried from one expert."""

    name: str
    role: Literal["base", "carry"]
    expert: str
    tensors: tuple[CopyTensor, ...]
    num_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class MergePlan:
    """All work of one build. `dtype` is the safetensors name of what is written."""

    recipe: Recipe
    kind: Kind
    method_parameters: dict[str, MethodParameters]
    """By merged tensor, the parameters that hold for it."""
    dtype: str
    merge_shards: tuple[MergeShard, ...]
    base_shards: tuple[CopyShard, ...]
    carry_shards: tuple[CopyShard, ...]
    renames: tuple[tuple[tuple[str, str], ...], ...]
    block_entries: int
    adapters: tuple[AdapterRecord, ...] = ()
    """Per expert how its adapters are used; empty but in builds of kind `adapters`."""
    checkpoints: tuple[Checkpoint, ...] = field(default=(), compare=False, repr=False)
    """The base and the experts, opened once: a run of the plan reads their identity and files."""

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
        """Bytes of tensors that are written."""
        return sum(shard.bytes_out for shard in self.merge_shards) + sum(
            shard.num_bytes for shard in self.copy_shards
        )

    @property
    def peak_bytes(self) -> int:
        """The most memory that any task of the plan takes."""
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
        max_shard_bytes: where a layer is split, in bytes of the base.
        memory_bytes: what a process may take with one task.

    Raises:
        CheckpointError, ShapeMismatch: the checkpoints cannot be read or do not fit together.
    """
    if block_entries is not None and (block_entries <= 0 or block_entries % (1 << 16)):
        raise ValueError(f"block_entries: expected a multiple of 65536, got {block_entries}")
    recipe = pin_recipe(recipe)
    base = Checkpoint(
        recipe.base, owner="base" if recipe.has_base else f"expert {recipe.experts[0].name!r}"
    )
    experts = [
        open_expert(expert.uri, owner=f"expert {expert.name!r}", base=base)
        for expert in recipe.experts
    ]
    method = find_method(recipe.method)
    if method.kind == "adapters":
        return _make_adapters_plan(
            recipe, base, experts, block_entries or DEFAULT_BLOCK_ENTRIES, max_shard_bytes
        )
    layout = make_layout(base, experts, merge=recipe.merge, carry=recipe.carry)
    check_unmerged_tensors(
        base, experts, renames=layout.renames, exempt=match_names(base.tensors, recipe.carry)
    )
    check_expert_only_tensors(base, experts, layout, kind=method.kind)
    dtype = NAMED_DTYPES[recipe.dtype] if recipe.dtype else _base_dtype(base)
    base_copies = tuple(base.tensors.values()) if method.kind == "masks" else layout.kept
    names = [expert.name for expert in recipe.experts]

    def make_shards(entries: int) -> tuple[MergeShard, ...]:
        working = Working(method, entries, recipe.non_finite == "keep")
        return tuple(_make_merge_shards(layout, recipe, dtype, working, max_shard_bytes))

    entries = block_entries or DEFAULT_BLOCK_ENTRIES
    merge_shards = make_shards(entries)
    while (
        memory_bytes is not None
        and (needed := process_bytes(shard.peak_bytes for shard in merge_shards)) > memory_bytes
    ):
        if block_entries is not None or entries <= MIN_BLOCK_ENTRIES:
            raise too_little_memory(needed, memory_bytes)
        entries //= 2
        merge_shards = make_shards(entries)
    return MergePlan(
        recipe=recipe,
        kind=method.kind,
        method_parameters=recipe.parameters_by_tensor([tensor.name for tensor in layout.shared]),
        dtype=dtype,
        merge_shards=merge_shards,
        base_shards=tuple(_make_base_shards(base_copies, max_shard_bytes)),
        carry_shards=tuple(
            shard
            for name, copied in zip(names, layout.copied, strict=True)
            for shard in _make_carry_shards(name, copied, max_shard_bytes)
        ),
        renames=layout.renames,
        block_entries=entries,
        checkpoints=(base, *experts),
    )


def _make_adapters_plan(
    recipe: Recipe,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    block_entries: int,
    max_shard_bytes: int,
) -> MergePlan:
    """Return the plan of a build that merges nothing: the base, and each expert's adapters and own
    tensors, are copied.
    """
    expert_adapters = list_adapters(recipe, base, experts)
    carry_shards: list[CopyShard] = []
    for expert, adapters in zip(recipe.experts, expert_adapters, strict=True):
        kinds: tuple[tuple[Role, dict[str, TensorSource]], ...] = (
            ("adapter", adapters.factors),
            ("carried", adapters.others),
        )
        tensors = [
            copy
            for role, sources in kinds
            for name, source in sources.items()
            for copy in _make_copies(name, role, source, 0, max_shard_bytes)
        ]
        carry_shards += _make_copy_shards(
            f"carry/{expert.name}", "carry", expert.name, tensors, max_shard_bytes
        )
    return MergePlan(
        recipe=recipe,
        kind="adapters",
        method_parameters={},
        dtype=NAMED_DTYPES[recipe.dtype] if recipe.dtype else _base_dtype(base),
        merge_shards=(),
        base_shards=tuple(_make_base_shards(tuple(base.tensors.values()), max_shard_bytes)),
        carry_shards=tuple(carry_shards),
        renames=tuple(() for _ in recipe.experts),
        block_entries=block_entries,
        adapters=tuple(adapters.record for adapters in expert_adapters),
        checkpoints=(base, *experts),
    )


def _base_dtype(base: Checkpoint) -> str:
    counted: dict[str, int] = {}
    for source in base.tensors.values():
        stored = source.weights if isinstance(source, BlockScaledSource) else source
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


def shard_name(tensor_name: str) -> str:
    """Return the shard that a tensor of the base belongs to: its layer, or itself for embeddings,
    last norm and head.
    """
    layer = layer_of(tensor_name)
    if layer is not None:
        return f"layers.{layer}"
    return tensor_name.removesuffix(".weight").removeprefix("model.")


def _shard_order(tensor_name: str) -> tuple[int, int, str]:
    """Sort embeddings first, then layers by number, then what follows them."""
    layer = layer_of(tensor_name)
    if layer is not None:
        return (1, layer, "")
    return (0 if is_before_layers(tensor_name) else 2, 0, shard_name(tensor_name))


def _group(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(shard_name(name), []).append(name)
    return {
        shard: groups[shard]
        for shard in sorted(groups, key=lambda shard: _shard_order(groups[shard][0]))
    }


def _make_pieces(shape: Sequence[int], num_bytes: int, max_bytes: int) -> list[tuple[int, int]]:
    """Return the row ranges into which a tensor is split so that each takes at most `max_bytes`
    (one row at least).
    """
    num_rows = shape[0] if shape else 1
    if num_bytes <= max_bytes or num_rows <= 1:
        return [(0, num_rows)]
    rows = max(1, max_bytes * num_rows // num_bytes)
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _slice(source: TensorSource, rows: tuple[int, int]) -> TensorSource:
    shape = source.spec.shape
    return source if not shape or rows == (0, shape[0]) else source.to_rows(*rows)


def _fill(items: Sequence[Any], sizes: Sequence[int], max_bytes: int) -> list[list[Any]]:
    """Return the items in successive groups of at most `max_bytes`."""
    groups: list[list[Any]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or total + size > max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups


def _number(name: str, index: int, count: int) -> str:
    return name if count == 1 else f"{name}.part{index}"


def _make_merge_shards(
    layout: Layout, recipe: Recipe, dtype: str, working: Working, max_bytes: int
) -> Iterable[MergeShard]:
    by_name = {tensor.name: tensor for tensor in layout.shared}
    method = working.method
    parameters = (recipe.parameters, [expert.parameters for expert in recipe.experts])
    group_bytes = 0 if method.task_unit == "tensor" else max_bytes
    for shard, names in _group(by_name).items():
        tasks = [
            task
            for name in names
            for task in _make_tensor_tasks(
                by_name[name],
                min(max_bytes, MAX_PIECE_BYTES),
                method.granularity_of(name, by_name[name].base.spec.shape, *parameters),
            )
        ]
        # A piece of a tensor is a shard of its own: within an object each tensor has one name.
        sizes = [
            task.base.spec.num_bytes if task.base.spec.shape == task.shape else group_bytes + 1
            for task in tasks
        ]
        groups = _fill(tasks, sizes, group_bytes)
        for index, group in enumerate(groups):
            num_masks = len(group[0].experts) if method.kind == "masks" else 0
            yield MergeShard(
                name=_number(shard, index, len(groups)),
                tensors=tuple(group),
                bytes_in=sum(task.num_bytes for task in group),
                bytes_out=sum(
                    task.num_entries * DTYPE_BYTES[dtype]
                    + num_masks * packed_bytes(task.num_entries)
                    for task in group
                ),
                peak_bytes=merge_peak_bytes(group, working),
            )


def _make_tensor_tasks(
    tensor: SharedTensor, max_bytes: int, granularity: Granularity
) -> list[TensorTask]:
    spec = tensor.base.spec
    # A method that must see a whole tensor gets it in one piece, however large it is.
    piece_bytes = sys.maxsize if granularity == "tensor" else min(max_bytes, MAX_PIECE_BYTES)
    num_rows = spec.shape[0] if spec.shape else 1
    return [
        TensorTask(
            tensor.name,
            *rows,
            num_rows,
            _slice(tensor.base, rows),
            tuple(_slice(source, rows) for source in tensor.experts),
            granularity,
        )
        for rows in _make_pieces(spec.shape, spec.num_bytes, piece_bytes)
    ]


def _make_base_shards(sources: Sequence[TensorSource], max_bytes: int) -> Iterable[CopyShard]:
    by_name = {source.spec.name: source for source in sources}
    for shard, names in _group(by_name).items():
        tensors = [
            tensor
            for name in names
            for tensor in _make_copies(name, "base", by_name[name], 0, max_bytes)
        ]
        yield from _make_copy_shards(f"base/{shard}", "base", "", tensors, max_bytes)


def _make_carry_shards(
    expert: str, copied: Sequence[CopiedTensor], max_bytes: int
) -> Iterable[CopyShard]:
    tensors = [
        copy
        for tensor in copied
        for copy in _make_copies(
            tensor.name,
            "extra_rows" if tensor.is_extra_rows else "carried",
            tensor.source,
            tensor.row_start,
            max_bytes,
        )
    ]
    yield from _make_copy_shards(f"carry/{expert}", "carry", expert, tensors, max_bytes)


def _make_copies(
    name: str, role: Role, source: TensorSource, first_row: int, max_bytes: int
) -> list[CopyTensor]:
    pieces = _make_pieces(source.spec.shape, source.spec.num_bytes, max_bytes)
    return [
        CopyTensor(name, role, first_row + rows[0], first_row + rows[1], _slice(source, rows))
        for rows in pieces
    ]


def _make_copy_shards(
    name: str,
    role: Literal["base", "carry"],
    expert: str,
    tensors: list[CopyTensor],
    max_bytes: int,
) -> Iterable[CopyShard]:
    # Wide entries first, then by name, as the official writer does: so every tensor is aligned to
    # its entries.
    tensors = sorted(
        tensors,
        key=lambda tensor: (-DTYPE_BYTES[tensor.source.spec.dtype], tensor.name, tensor.row_start),
    )
    groups = _fill(tensors, [tensor.source.spec.num_bytes for tensor in tensors], max_bytes)
    for index, group in enumerate(groups):
        num_bytes = sum(tensor.source.spec.num_bytes for tensor in group)
        yield CopyShard(
            _number(name, index, len(groups)),
            role,
            expert,
            tuple(group),
            num_bytes,
            COPY_PEAK_BYTES + total_prefetch_bytes([group[0].source]),
        )
