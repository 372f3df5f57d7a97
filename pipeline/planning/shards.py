"""Shards of a plan: the tensors of one layer, split where a layer or a tensor is too large."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mmerge.manifests.format.entry import Role
from mmerge.manifests.format.object_header import packed_bytes
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.pipeline.planning.adapters import ExpertAdapters
from mmerge.pipeline.planning.memory_bounds import (
    COPY_ENTRIES,
    COPY_PEAK_BYTES,
    MergeMemory,
    forming_bytes,
    merge_peak_bytes,
)
from mmerge.pipeline.planning.tensor_layout import CopiedTensor, Layout, SharedTensor
from mmerge.pipeline.recipes.recipe import Recipe
from mmerge.workers.checkpoints.sources import TensorSource, total_prefetch_bytes
from mmerge.workers.families.registry import is_before_layers
from mmerge.workers.methods.interface import Granularity
from mmerge.workers.task import CopyTensor, TensorTask

MAX_PIECE_BYTES = 256 << 20
"""Limit for the rows of one base tensor that a task merges: their masks are held in memory."""

Item = TypeVar("Item")


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
    """Tensors of the base or of one expert that are copied unchanged."""

    name: str
    role: Literal["base", "carry"]
    expert: str
    tensors: tuple[CopyTensor, ...]
    num_bytes: int
    peak_bytes: int


def make_merge_shards(
    layout: Layout, recipe: Recipe, *, dtype: str, memory: MergeMemory, max_bytes: int
) -> Iterator[MergeShard]:
    """Yield the shards of all merged tensors, in the order of the layers.

    Args:
        layout: which tensors are merged.
        recipe: its parameters decide what the method must see of a tensor at once.
        dtype: safetensors name of the output's dtype.
        memory: what decides the memory of a merge.
        max_bytes: limit for the base tensors of one shard.
    """
    by_name = {tensor.name: tensor for tensor in layout.shared}
    method = memory.method
    parameters = (recipe.parameters, [expert.parameters for expert in recipe.experts])
    group_bytes = 0 if method.task_unit == "tensor" else max_bytes
    for shard, names in _group_by_layer(by_name).items():
        tasks = []
        for name in names:
            granularity = method.granularity_of(name, by_name[name].base.spec.shape, *parameters)
            tasks += _make_tensor_tasks(
                by_name[name], max_bytes=min(max_bytes, MAX_PIECE_BYTES), granularity=granularity
            )
        # A piece of a tensor is a shard of its own: within an object each tensor has one name.
        sizes = [
            task.base.spec.num_bytes if task.base.spec.shape == task.shape else group_bytes + 1
            for task in tasks
        ]
        groups = _group_by_size(tasks, sizes, max_bytes=group_bytes)
        for index, group in enumerate(groups):
            num_masks = len(group[0].experts) if method.kind == "masks" else 0
            yield MergeShard(
                name=_part_name(shard, index, count=len(groups)),
                tensors=tuple(group),
                bytes_in=sum(task.num_bytes for task in group),
                bytes_out=sum(
                    task.num_entries * DTYPE_BYTES[dtype]
                    + num_masks * packed_bytes(task.num_entries)
                    for task in group
                ),
                peak_bytes=merge_peak_bytes(group, memory),
            )


def make_base_shards(sources: Sequence[TensorSource], *, max_bytes: int) -> Iterator[CopyShard]:
    """Yield the shards of the base tensors that are stored, in the order of the layers."""
    by_name = {source.spec.name: source for source in sources}
    for shard, names in _group_by_layer(by_name).items():
        tensors = []
        for name in names:
            tensors += _make_copies(name, by_name[name], role="base", max_bytes=max_bytes)
        yield from _make_copy_shards(
            f"base/{shard}", tensors, role="base", expert="", max_bytes=max_bytes
        )


def make_carry_shards(
    expert: str, copied: Sequence[CopiedTensor], *, max_bytes: int
) -> Iterator[CopyShard]:
    """Yield the shards of the tensors that are copied from one expert."""
    tensors = []
    for tensor in copied:
        tensors += _make_copies(
            tensor.name,
            tensor.source,
            role="extra_rows" if tensor.is_extra_rows else "carried",
            first_row=tensor.row_start,
            max_bytes=max_bytes,
        )
    yield from _make_copy_shards(
        f"carry/{expert}", tensors, role="carry", expert=expert, max_bytes=max_bytes
    )


def make_adapter_shards(
    expert: str, adapters: ExpertAdapters, *, max_bytes: int
) -> Iterator[CopyShard]:
    """Yield the shards of one expert's adapters and of its other tensors."""
    tensors = []
    for name, source in adapters.factors.items():
        tensors += _make_copies(name, source, role="adapter", max_bytes=max_bytes)
    for name, source in adapters.others.items():
        tensors += _make_copies(name, source, role="carried", max_bytes=max_bytes)
    yield from _make_copy_shards(
        f"carry/{expert}", tensors, role="carry", expert=expert, max_bytes=max_bytes
    )


def _make_tensor_tasks(
    tensor: SharedTensor, *, max_bytes: int, granularity: Granularity
) -> list[TensorTask]:
    spec = tensor.base.spec
    # A method that must see a whole tensor gets it in one piece, however large it is.
    piece_bytes = sys.maxsize if granularity == "tensor" else max_bytes
    return [
        TensorTask(
            name=tensor.name,
            row_start=rows[0],
            row_stop=rows[1],
            num_rows=spec.shape[0] if spec.shape else 1,
            base=_slice(tensor.base, rows),
            experts=tuple(_slice(source, rows) for source in tensor.experts),
            granularity=granularity,
        )
        for rows in _split_rows(spec.shape, spec.num_bytes, max_bytes=piece_bytes)
    ]


def _make_copies(
    name: str, source: TensorSource, *, role: Role, first_row: int = 0, max_bytes: int
) -> list[CopyTensor]:
    return [
        CopyTensor(name, role, first_row + rows[0], first_row + rows[1], _slice(source, rows))
        for rows in _split_rows(source.spec.shape, source.spec.num_bytes, max_bytes=max_bytes)
    ]


def _make_copy_shards(
    name: str,
    tensors: Sequence[CopyTensor],
    *,
    role: Literal["base", "carry"],
    expert: str,
    max_bytes: int,
) -> Iterator[CopyShard]:
    # Wide dtypes first, then by name, as the official safetensors writer does: every tensor is then
    # aligned to its entries.
    tensors = sorted(
        tensors,
        key=lambda tensor: (-DTYPE_BYTES[tensor.source.spec.dtype], tensor.name, tensor.row_start),
    )
    sizes = [tensor.source.spec.num_bytes for tensor in tensors]
    groups = _group_by_size(tensors, sizes, max_bytes=max_bytes)
    for index, group in enumerate(groups):
        yield CopyShard(
            name=_part_name(name, index, count=len(groups)),
            role=role,
            expert=expert,
            tensors=tuple(group),
            num_bytes=sum(tensor.source.spec.num_bytes for tensor in group),
            peak_bytes=COPY_PEAK_BYTES
            + total_prefetch_bytes([group[0].source])
            + max(forming_bytes([item.source], entries=COPY_ENTRIES) for item in group),
        )


def _shard_name(tensor_name: str) -> str:
    """Return the name of a base tensor's shard.

    It is that of its layer; embeddings, last norm and head are shards of their own.
    """
    layer = layer_of(tensor_name)
    if layer is not None:
        return f"layers.{layer}"
    return tensor_name.removesuffix(".weight").removeprefix("model.")


def _shard_order(tensor_name: str) -> tuple[int, int, str]:
    """Return a sort key: embeddings first, then layers by number, then the remaining tensors."""
    layer = layer_of(tensor_name)
    if layer is not None:
        return (1, layer, "")
    return (0 if is_before_layers(tensor_name) else 2, 0, _shard_name(tensor_name))


def _group_by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_shard_name(name), []).append(name)
    return {
        shard: groups[shard]
        for shard in sorted(groups, key=lambda shard: _shard_order(groups[shard][0]))
    }


def _group_by_size(
    items: Sequence[Item], sizes: Sequence[int], *, max_bytes: int
) -> list[list[Item]]:
    """Return the items in successive groups of at most `max_bytes`, one item at least."""
    groups: list[list[Item]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or total + size > max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups


def _split_rows(shape: Sequence[int], num_bytes: int, *, max_bytes: int) -> list[tuple[int, int]]:
    """Return row ranges of a tensor that take at most `max_bytes` each, one row at least."""
    num_rows = shape[0] if shape else 1
    if num_bytes <= max_bytes or num_rows <= 1:
        return [(0, num_rows)]
    rows = max(1, max_bytes * num_rows // num_bytes)
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _slice(source: TensorSource, rows: tuple[int, int]) -> TensorSource:
    shape = source.spec.shape
    return source if not shape or rows == (0, shape[0]) else source.to_rows(*rows)


def _part_name(name: str, index: int, *, count: int) -> str:
    return name if count == 1 else f"{name}.part{index}"
