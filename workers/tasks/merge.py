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
from numpy.typing import NDArray

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.format.entry import (
    ObjectEntry,
    ShardEntry,
    TensorRow,
    TensorStatistics,
    object_key,
    read_entry,
    write_entry,
)
from mmerge.manifests.format.object_header import delta_name, make_metadata, mask_name
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, TensorSpec, make_header
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.writer import ObjectWriter
from mmerge.workers.checkpoints.block_reader import InputBlock, InputReader
from mmerge.workers.checkpoints.dtypes import to_bytes, with_one_nan
from mmerge.workers.compiled.interface import FastPath, MaskPath, PathRequest, ReadBlocks
from mmerge.workers.compiled.registry import find_fast_path
from mmerge.workers.kernels.tiles import TILE_ENTRIES, add_squares
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import (
    Block,
    MergedBlock,
    Method,
    entries_at_once,
    parse_numbers,
)
from mmerge.workers.reconstruction.bitmask import packed_bytes
from mmerge.workers.task import MergeTask, TaskResult, TensorTask
from mmerge.workers.tasks.blocks import read_blocks
from mmerge.workers.tasks.heartbeat import Pulse
from mmerge.workers.tasks.overflow import OverflowCheck


def merge_shard(task: MergeTask, store: Store) -> TaskResult:
    """Merge one shard into the store; a shard that a previous run finished is left as it is."""
    began = time.monotonic()
    found = None if task.fresh else read_entry(store, task.digest)
    if found is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began, found)
    method = find_method(task.method)
    header, specs = make_header(
        _make_layout(task, method),
        metadata=make_metadata(task.digest, role="merge", method=task.method),
    )
    placed = {spec.name: spec for spec in specs}
    rows: list[TensorRow] = []
    pulse = Pulse(f"{task.shard}: {task.method}", num_steps=len(task.tensors))
    with pulse, InputReader() as reader, store.open_writer(object_key(task.digest)) as out:
        out.write(header)
        for index, tensor in enumerate(task.tensors):
            pulse.begin(f"{tensor.name} {list(tensor.base.spec.shape)}")
            rows += _TensorMerger(task, method, index).write(out, placed, reader)
    entry = ShardEntry(
        object=ObjectEntry(
            key=out.key,
            shard=task.shard,
            role="merge",
            num_bytes=out.num_bytes,
            digest=out.hexdigest(),
        ),
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
        layout += [
            (mask_name(tensor.name, expert), "U8", [packed_bytes(tensor.num_entries)])
            for expert in task.expert_names
        ]
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
        self.kept, self.agreeing, self.masked, self.consensus = (
            [0] * n,
            [0] * n,
            [0] * n,
            [0] * (n + 1),
        )
        self.overlaps, self.squares = [0] * (n * (n - 1) // 2), [_SquareSum() for _ in range(n + 1)]

    def take(self, path: MaskPath) -> None:
        """Take the counts of a compiled path."""
        n = self.num_experts
        self.kept, self.agreeing, self.masked = (
            path.counts[0, :n].tolist(),
            path.counts[1, :n].tolist(),
            path.counts[2, :n].tolist(),
        )
        self.consensus, self.overlaps, self.squares = (
            path.counts[3].tolist(),
            path.overlaps.tolist(),
            [_SquareSum(total) for total in path.squares.tolist()],
        )

    def add(self, block: Block, merged: MergedBlock) -> None:
        for index, delta in enumerate(block.task_vectors()):
            self.squares[index].add(delta)
        self.squares[-1].add(merged.values.to(torch.float32))
        for index, trimmed in enumerate(merged.trimmed):
            self.kept[index] += int(trimmed.count_nonzero())
            if merged.sign is not None:
                self.agreeing[index] += int(
                    ((trimmed.sign() == merged.sign) & (merged.sign != 0)).count_nonzero()
                )
        if merged.masks:
            masks = torch.stack([mask.reshape(-1) for mask in merged.masks])
            for wanted, count in enumerate(
                torch.bincount(masks.sum(dim=0), minlength=self.num_experts + 1).tolist()
            ):
                self.consensus[wanted] += count
            for index, mask in enumerate(merged.masks):
                self.masked[index] += int(mask.count_nonzero())
            for index, (one, other) in enumerate(itertools.combinations(merged.masks, 2)):
                self.overlaps[index] += int((one & other).count_nonzero())


class _SquareSum:
    """Σ x² over a tensor, summed tile by tile whatever the blocks are: entries of an unfinished
    tile wait for the next block.
    """

    def __init__(self, total: float = 0.0) -> None:
        self._total = total
        self._waiting = np.empty(0, dtype=np.float32)

    def add(self, values: torch.Tensor) -> None:
        flat = values.reshape(-1).cpu().numpy()
        if len(self._waiting):
            flat = np.concatenate([self._waiting, flat])
        whole = len(flat) - len(flat) % TILE_ENTRIES
        self._total = add_squares(self._total, flat[:whole])
        self._waiting = flat[whole:].copy()

    def total(self) -> float:
        return add_squares(self._total, self._waiting)


class _TensorMerger:
    """Merges one tensor of a shard: values are written as they are made, masks wait until the
    tensor is done.
    """

    def __init__(self, task: MergeTask, method: Method, index: int) -> None:
        self.task, self.method = task, method
        self.tensor: TensorTask = task.tensors[index]
        self.thresholds, self.known = task.thresholds[index], task.known[index]
        self.parameters, self.experts = parse_numbers(method, task.numbers[index])
        self.tally = _Tally(len(self.experts))
        self.overflow = (
            OverflowCheck(self.tensor, task.expert_names, method.kind == "masks")
            if task.dtype == "F16"
            else None
        )

    def write(
        self, out: ObjectWriter, placed: dict[str, TensorSpec], reader: InputReader
    ) -> list[TensorRow]:
        digest = blake3()
        num_masks = len(self.experts) if self.method.kind == "masks" else 0
        masks = np.zeros((num_masks, packed_bytes(self.tensor.num_entries)), np.uint8)
        for data in self._merge_by_path(reader, masks) or self._merge_by_method(reader, masks):
            digest.update(data)
            out.write(data)
        return [
            self._make_values_row(placed, digest.hexdigest()),
            *self._write_masks(out, placed, masks),
        ]

    def _merge_by_path(
        self, reader: InputReader, masks: NDArray[np.uint8]
    ) -> Iterator[memoryview] | None:
        """Return the bytes of the merged values block by block, None where the method has no
        compiled path.
        """
        request = PathRequest(
            self.parameters,
            self.experts,
            self.thresholds,
            self.known,
            self.tensor,
            self.task.expert_names,
            self.task.dtype,
        )
        path = find_fast_path(self.task.method, request)
        if path is None:
            return None
        shape = self.tensor.base.spec.shape
        at_once = entries_at_once(
            shape, self.task.block_entries, granularity="row" if path.by_row else "entry"
        )

        def read_blocks() -> Iterator[InputBlock]:
            return reader.blocks((self.tensor.base, *self.tensor.experts), block_entries=at_once)

        return (
            self._run_path(path, read_blocks, masks, at_once) if path.prepare(read_blocks) else None
        )

    def _run_path(
        self, path: FastPath, read_blocks: ReadBlocks, masks: NDArray[np.uint8], at_once: int
    ) -> Iterator[memoryview]:
        width = DTYPE_BYTES[self.task.dtype]
        merged = np.empty(min(at_once, self.tensor.num_entries) * width, np.uint8)
        for block in read_blocks():
            path.merge(block, merged, masks)
            if self.overflow is not None:
                self.overflow.check_inputs(block, merged[: block.num_entries * width])
            yield merged.data[: block.num_entries * width]
        if isinstance(path, MaskPath):
            self.tally.take(path)

    def _merge_by_method(
        self, reader: InputReader, masks: NDArray[np.uint8]
    ) -> Iterator[memoryview]:
        position = 0
        device = (
            getattr(self.parameters, "device", "cpu")
            if self.tensor.granularity == "tensor"
            else "cpu"
        )
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError(
                "device: this machine has no CUDA device for 'cuda'. Run where there is one, or"
                " take 'device' out"
            )
        for block in self._read_blocks(reader):
            merged = self.method.merge_block(
                block if device == "cpu" else block.to_device(device), self.parameters, self.experts
            )
            if self.method.kind == "masks":
                self.tally.add(block, merged)
            for row, mask in zip(masks, merged.masks, strict=True):
                packed = np.packbits(mask.reshape(-1).cpu().numpy())
                row[position // 8 :][: len(packed)] = packed
            data = to_bytes(with_one_nan(merged.values))
            if self.overflow is not None:
                inputs = (block.base, *block.experts)
                self.overflow.check_tensors(inputs, np.frombuffer(data, np.uint8), start=position)
            position += block.base.numel()
            yield data

    def _read_blocks(self, reader: InputReader) -> Iterator[Block]:
        return read_blocks(
            self.tensor, reader, thresholds=self.thresholds, known=self.known, expert_names=self.task.expert_names,
            dtype=self.task.dtype, block_entries=self.task.block_entries,
        )  # fmt: skip

    def _write_masks(
        self, out: ObjectWriter, placed: dict[str, TensorSpec], masks: NDArray[np.uint8]
    ) -> list[TensorRow]:
        rows = []
        for index, packed in enumerate(masks):
            data = packed.data
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
            rows.append(
                self._make_row(spec, "mask", expert, str(blake3(data).hexdigest()), statistics)
            )
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
        return self._make_row(
            placed[name], "delta" if has_masks else "merged", "", digest, statistics
        )

    def _make_row(
        self, spec: TensorSpec, role: str, expert: str, digest: str, statistics: TensorStatistics
    ) -> TensorRow:
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
    # float32 keeps what every machine computes alike: the last bits of a float64 sum depend on its
    # SIMD width.
    return float(np.float32(math.sqrt(squares)))
