"""Merge one shard: stream blocks of base and experts through the method into one object."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from blake3 import blake3

from mmerge.manifests.entry import ObjectEntry, ShardEntry, TensorRow, TensorStatistics, object_key, read_entry, write_entry
from mmerge.manifests.header import TensorSpec, make_header
from mmerge.manifests.store import ObjectWriter, Store
from mmerge.workers.blocks import read_blocks
from mmerge.workers.checkpoint import OpenStores
from mmerge.workers.dtypes import to_bytes
from mmerge.workers.masks import pack_mask, packed_bytes
from mmerge.workers.measure import parse_numbers
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Block, MergedBlock, Method
from mmerge.workers.task import MergeTask, TaskResult, TensorTask

TILE_ENTRIES = 1 << 16
"""Norms are summed tile by tile, so that they do not depend on the block size; blocks are whole tiles."""


def delta_name(name: str) -> str:
    """Return the name of τ⋆ of a tensor within its object."""
    return f"{name}.delta"


def mask_name(name: str, expert: str) -> str:
    """Return the name of an expert's packed mask of a tensor within its object."""
    return f"{name}.mask.{expert}"


def merge_shard(task: MergeTask, store: Store) -> TaskResult:
    """Merge one shard into the store; a shard that a previous run finished is left as it is."""
    began = time.monotonic()
    found = None if task.fresh else read_entry(store, task.digest)
    if found is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began, found)
    method = find_method(task.method)
    header, specs = make_header(_make_layout(task, method), metadata={"mmerge": task.digest, "method": task.method})
    placed = {spec.name: spec for spec in specs}
    rows: list[TensorRow] = []
    with store.open_writer(object_key(task.digest)) as out:
        out.write(header)
        for index in range(len(task.tensors)):
            rows += _TensorMerger(task, method, index).write(out, placed)
    entry = ShardEntry(
        object=ObjectEntry(key=out.key, shard=task.shard, role="merge", num_bytes=out.num_bytes, digest=out.hexdigest()),
        tensors=tuple(rows),
    )
    write_entry(store, task.digest, entry)
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - began, entry)


def _make_layout(task: MergeTask, method: Method) -> list[tuple[str, str, Sequence[int]]]:
    layout: list[tuple[str, str, Sequence[int]]] = []
    for tensor in task.tensors:
        shape = tensor.base.spec.shape
        if method.kind == "plain":
            layout.append((tensor.name, task.dtype, shape))
            continue
        layout.append((delta_name(tensor.name), task.dtype, shape))
        layout += [(mask_name(tensor.name, expert), "U8", [packed_bytes(tensor.num_entries)]) for expert in task.expert_names]
    return layout


@dataclass
class _Tally:
    """Counts and norms of one tensor, added up block by block."""

    num_experts: int
    kept: list[int] = field(default_factory=list)
    agreeing: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    consensus: list[int] = field(default_factory=list)
    overlaps: list[int] = field(default_factory=list)
    squares: list[_SquareSum] = field(default_factory=list)
    """Squared norms of the task vectors, then of the stored values."""

    def __post_init__(self) -> None:
        n = self.num_experts
        self.kept, self.agreeing, self.masked, self.consensus = [0] * n, [0] * n, [0] * n, [0] * (n + 1)
        self.overlaps, self.squares = [0] * (n * (n - 1) // 2), [_SquareSum() for _ in range(n + 1)]

    def add(self, block: Block, merged: MergedBlock) -> None:
        for index, delta in enumerate(block.task_vectors()):
            self.squares[index].add(delta)
        self.squares[-1].add(merged.values.to(torch.float32))
        for index, trimmed in enumerate(merged.trimmed):
            self.kept[index] += int(trimmed.count_nonzero())
            if merged.sign is not None:
                self.agreeing[index] += int(((trimmed.sign() == merged.sign) & (merged.sign != 0)).count_nonzero())
        if merged.masks:
            masks = torch.stack([mask.reshape(-1) for mask in merged.masks])
            for wanted, count in enumerate(torch.bincount(masks.sum(dim=0), minlength=self.num_experts + 1).tolist()):
                self.consensus[wanted] += count
            for index, mask in enumerate(merged.masks):
                self.masked[index] += int(mask.count_nonzero())
            for index, (one, other) in enumerate(itertools.combinations(merged.masks, 2)):
                self.overlaps[index] += int((one & other).count_nonzero())


class _SquareSum:
    """Σ x² over a tensor, summed tile by tile whatever the blocks are: entries of an unfinished tile wait for the next block."""

    def __init__(self) -> None:
        self._total = 0.0
        self._waiting = np.empty(0, dtype=np.float32)

    def add(self, values: torch.Tensor) -> None:
        flat = values.reshape(-1).cpu().numpy()
        if len(self._waiting):
            flat = np.concatenate([self._waiting, flat])
        whole = len(flat) - len(flat) % TILE_ENTRIES
        for start in range(0, whole, TILE_ENTRIES):
            self._total += float(np.square(flat[start : start + TILE_ENTRIES], dtype=np.float64).sum())
        self._waiting = flat[whole:].copy()

    def total(self) -> float:
        return self._total + float(np.square(self._waiting, dtype=np.float64).sum())


class _TensorMerger:
    """Merges one tensor of a shard: values are written as they are made, masks wait until the tensor is done."""

    def __init__(self, task: MergeTask, method: Method, index: int) -> None:
        self.task, self.method = task, method
        self.tensor: TensorTask = task.tensors[index]
        self.thresholds, self.known = task.thresholds[index], task.known[index]
        self.parameters, self.experts = parse_numbers(method, task.numbers[index])
        self.tally = _Tally(len(self.experts))

    def write(self, out: ObjectWriter, placed: dict[str, TensorSpec]) -> list[TensorRow]:
        digest = blake3()
        masks: list[list[torch.Tensor]] = [[] for _ in self.experts] if self.method.kind == "masks" else []
        for block in self._read_blocks():
            merged = self.method.merge_block(block, self.parameters, self.experts)
            self.tally.add(block, merged)
            data = to_bytes(merged.values)
            digest.update(data)
            out.write(data)
            for packed, mask in zip(masks, merged.masks, strict=True):
                packed.append(pack_mask(mask))
        return [self._make_values_row(placed, digest.hexdigest()), *self._write_masks(out, placed, masks)]

    def _read_blocks(self) -> Iterator[Block]:
        return read_blocks(
            self.tensor, OpenStores(), thresholds=self.thresholds, known=self.known, expert_names=self.task.expert_names,
            dtype=self.task.dtype, block_entries=self.task.block_entries,
        )  # fmt: skip

    def _write_masks(self, out: ObjectWriter, placed: dict[str, TensorSpec], masks: list[list[torch.Tensor]]) -> list[TensorRow]:
        rows = []
        for index, pieces in enumerate(masks):
            data = to_bytes(torch.cat(pieces)) if pieces else memoryview(b"")
            out.write(data)
            expert = self.task.expert_names[index]
            statistics = TensorStatistics(
                num_entries=self.tensor.num_entries,
                num_kept=self.tally.kept[index],
                num_agreeing=self.tally.agreeing[index],
                num_masked=self.tally.masked[index],
                task_vector_norm=_to_norm(self.tally.squares[index].total()),
            )
            spec = placed[mask_name(self.tensor.name, expert)]
            rows.append(self._make_row(spec, "mask", expert, str(blake3(data).hexdigest()), statistics))
        return rows

    def _make_values_row(self, placed: dict[str, TensorSpec], digest: str) -> TensorRow:
        has_masks = self.method.kind == "masks"
        statistics = TensorStatistics(
            num_entries=self.tensor.num_entries,
            delta_norm=_to_norm(self.tally.squares[-1].total()) if has_masks else None,
            consensus=tuple(self.tally.consensus) if has_masks else None,
            overlaps=tuple(self.tally.overlaps) if has_masks else None,
        )
        name = delta_name(self.tensor.name) if has_masks else self.tensor.name
        return self._make_row(placed[name], "delta" if has_masks else "merged", "", digest, statistics)

    def _make_row(self, spec: TensorSpec, role: str, expert: str, digest: str, statistics: TensorStatistics) -> TensorRow:
        return TensorRow.model_validate(
            {
                "name": self.tensor.name, "role": role, "expert": expert, "dtype": spec.dtype, "shape": self.tensor.base.spec.shape,
                "row_start": self.tensor.row_start, "row_stop": self.tensor.row_stop, "offset": spec.offset,
                "num_bytes": spec.num_bytes, "digest": digest, "statistics": statistics,
            }
        )  # fmt: skip


def _to_norm(squares: float) -> float | None:
    if not math.isfinite(squares):
        return None  # JSON knows no NaN: a tensor with kept NaN or Inf has no norm
    # float32 keeps what every machine computes alike: the last bits of a float64 sum depend on its SIMD width.
    return float(np.float32(math.sqrt(squares)))
